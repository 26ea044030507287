//! Owns keys and values as text: the encodings of the command line, and `{"utf8":…}` or
//! `{"base64":…}` in JSON. Does not know where the text goes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::args::Encoding;

/// Bytes as they stand in JSON.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Text {
    /// They are text.
    Utf8(String),
    /// They are not.
    Base64(String),
}

impl Text {
    /// As text where they are text.
    pub fn of(bytes: &[u8]) -> Text {
        match std::str::from_utf8(bytes) {
            Ok(text) => Text::Utf8(text.to_owned()),
            Err(_) => Text::Base64(STANDARD.encode(bytes)),
        }
    }

    /// The bytes again.
    pub fn into_bytes(self) -> Result<Vec<u8>, String> {
        match self {
            Text::Utf8(text) => Ok(text.into_bytes()),
            Text::Base64(text) => decode(Encoding::Base64, &text),
        }
    }
}

/// Bytes as text for people or pipes. `Utf8` leaves them as they are.
pub fn encode(encoding: Encoding, bytes: &[u8]) -> Vec<u8> {
    match encoding {
        Encoding::Utf8 => bytes.to_vec(),
        Encoding::Hex => bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect(),
        Encoding::Base64 => STANDARD.encode(bytes).into_bytes(),
        Encoding::Escape => escape(bytes).into_bytes(),
    }
}

/// The bytes that a text of the command line means.
pub fn decode(encoding: Encoding, text: &str) -> Result<Vec<u8>, String> {
    match encoding {
        Encoding::Utf8 => Ok(text.as_bytes().to_vec()),
        Encoding::Hex => {
            let digits = text.as_bytes();
            let byte = |pair: &[u8]| {
                let pair = std::str::from_utf8(pair).ok()?;
                let hex = pair.bytes().all(|byte| byte.is_ascii_hexdigit());
                hex.then(|| u8::from_str_radix(pair, 16).ok())?
            };
            let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
            bytes
                .filter(|_| digits.len().is_multiple_of(2))
                .ok_or_else(|| format!("{text:?} is not hex: an even number of digits 0 to f"))
        }
        Encoding::Base64 => {
            STANDARD.decode(text).map_err(|error| format!("{text:?} is not base64: {error}"))
        }
        Encoding::Escape => unescape(text.as_bytes()),
    }
}

/// Text as it is, with `\n`, `\r`, `\t`, `\\`, and `\x00` for what is not text. Never has a line
/// break or a tab.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\\' => out.push_str("\\\\"),
                char if char.is_control() => {
                    let mut utf8 = [0; 4];
                    for byte in char.encode_utf8(&mut utf8).bytes() {
                        out.push_str(&format!("\\x{byte:02x}"));
                    }
                }
                char => out.push(char),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// The bytes that [`escape`] was given.
pub fn unescape(text: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let (known, used) = match rest {
            [b'n', ..] => (Some(b'\n'), 1),
            [b'r', ..] => (Some(b'\r'), 1),
            [b't', ..] => (Some(b'\t'), 1),
            [b'\\', ..] => (Some(b'\\'), 1),
            [b'x', high, low, ..] => {
                let digit = |byte: u8| (byte as char).to_digit(16);
                let value = digit(*high).zip(digit(*low)).map(|(high, low)| high * 16 + low);
                (value.and_then(|value| u8::try_from(value).ok()), 3)
            }
            _ => (None, 0),
        };
        let at = text.len() - rest.len() - 1;
        let byte = known.ok_or_else(|| {
            format!("unknown escape at byte {at}: known are \\n, \\r, \\t, \\\\ and \\x00 to \\xff")
        })?;
        out.push(byte);
        rest = &rest[used..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_comes_back() {
        let all: Vec<u8> = (0..=255).chain("ä\u{85}\u{10ffff}".bytes()).collect();
        for encoding in [Encoding::Hex, Encoding::Base64, Encoding::Escape] {
            let text = String::from_utf8(encode(encoding, &all)).unwrap();
            assert!(!text.contains(['\n', '\t', '\r']), "{encoding:?}");
            assert_eq!(decode(encoding, &text).unwrap(), all, "{encoding:?}");
        }
        assert_eq!(Text::of(&all).into_bytes().unwrap(), all);
        assert_eq!(Text::of("ä".as_bytes()), Text::Utf8("ä".to_owned()));
    }

    #[test]
    fn what_cannot_be_decoded_says_so() {
        for (encoding, text) in [
            (Encoding::Hex, "abc"),
            (Encoding::Hex, "+a"),
            (Encoding::Hex, "zz"),
            (Encoding::Base64, "a"),
            (Encoding::Escape, "a\\q"),
            (Encoding::Escape, "\\x1"),
            (Encoding::Escape, "\\"),
        ] {
            assert!(decode(encoding, text).is_err(), "{encoding:?} {text}");
        }
        let error = unescape(b"ab\\q").unwrap_err();
        assert!(error.contains("byte 2"), "{error}");
    }

    #[test]
    fn people_see_text_as_text() {
        assert_eq!(escape("Grüße\n\0".as_bytes()), "Grüße\\n\\x00");
        assert_eq!(escape(b"\xff\\"), "\\xff\\\\");
    }
}
