//! Owns numbers as people read them: bytes, durations, counts. JSON never sees these.

use std::time::Duration;

/// `512 B`, `1.5 KiB`, `23 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would be printed as 1024 is one of the next unit.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value < 9.95 {
        true => format!("{value:.1} {}", UNITS[unit]),
        false => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// How long something took or lasted: `0.3 ms`, `850 ms`, `2.4 s`, `5 min`, `3 h`, `12 d`.
pub fn duration(span: Duration) -> String {
    let seconds = span.as_secs_f64();
    match span.as_secs() {
        0 => latency(span),
        1..60 => format!("{seconds:.1} s"),
        60..3_600 => format!("{} min", span.as_secs() / 60),
        3_600..86_400 => format!("{} h", span.as_secs() / 3_600),
        _ => format!("{} d", span.as_secs() / 86_400),
    }
}

/// A latency, in milliseconds: `0.4 ms`, `12 ms`, `1 203 ms`.
pub fn latency(span: Duration) -> String {
    let ms = span.as_secs_f64() * 1e3;
    match ms < 9.95 {
        true => format!("{ms:.1} ms"),
        false => format!("{} ms", count(ms.round() as u64)),
    }
}

/// With a space between thousands: `63 666`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(23 << 20), "23 MiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16 EiB");
        assert_eq!(duration(Duration::from_micros(310)), "0.3 ms");
        assert_eq!(duration(Duration::from_millis(2_400)), "2.4 s");
        assert_eq!(duration(Duration::from_secs(90_000)), "1 d");
        assert_eq!(latency(Duration::from_millis(1_203)), "1 203 ms");
        assert_eq!(count(63_666), "63 666");
        assert_eq!(count(100), "100");
        assert_eq!(count(1_000_000), "1 000 000");
    }
}
