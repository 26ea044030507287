//! Owns what is kept of a judged request, and its bytes (FORMAT.md). Does not answer with it (see
//! `apply`).

use bytes::{BufMut, Bytes, BytesMut};

use crate::wire::{Malformed, Reader};

const FORMAT_VERSION: u8 = 1;

const VERDICT_APPLIED: u8 = 1;
const VERDICT_CONDITION_FAILED: u8 = 2;
const VERDICT_INVALID: u8 = 3;
const VERDICT_RANGE_DELETED: u8 = 4;
const VERDICT_RANGE_TOO_LARGE: u8 = 5;

/// Far above what an entry can hold; bounds what a damaged record may claim.
const OPERATIONS_MAX: u32 = 1 << 21;

/// What is kept of a judged request: what the state cannot tell again. Values are not: a failed
/// condition's is read again, at the version at which it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredResult {
    pub(super) term: u64,
    pub(super) index: u64,
    pub(super) version: u64,
    pub(super) verdict: Verdict,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The operations that incremented, by number, with what they left.
    Applied {
        operations: u32,
        counters: Vec<(u32, i64)>,
    },
    /// The operations whose condition failed, by number, with what they met.
    ConditionFailed {
        operations: u32,
        failed: Vec<(u32, Option<Met>)>,
    },
    Invalid(Invalid),
    /// How far a delete-range went, and over which arc: neither follows from the request alone.
    RangeDeleted {
        deleted: u32,
        next: Bytes,
        arc: Option<(u64, u64)>,
    },
    RangeTooLarge {
        limit: u32,
    },
}

/// What a failed condition met, but for the value.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Met {
    pub(super) version: u64,
    /// 0: never.
    pub(super) expires_at: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Invalid {
    CounterNotANumber,
    CounterOverflow,
}

impl Invalid {
    pub(super) fn why(self) -> &'static str {
        match self {
            Invalid::CounterNotANumber => "the value to increment is not a 64-bit decimal number",
            Invalid::CounterOverflow => "the increment leaves the range of 64-bit numbers",
        }
    }
}

impl StoredResult {
    pub(super) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        out.put_u8(FORMAT_VERSION);
        out.put_u64(self.term);
        out.put_u64(self.index);
        out.put_u64(self.version);
        match &self.verdict {
            Verdict::Applied { operations, counters } => {
                out.put_u8(VERDICT_APPLIED);
                out.put_u32(*operations);
                out.put_u32(counters.len() as u32);
                for (at, number) in counters {
                    out.put_u32(*at);
                    out.put_i64(*number);
                }
            }
            Verdict::ConditionFailed { operations, failed } => {
                out.put_u8(VERDICT_CONDITION_FAILED);
                out.put_u32(*operations);
                out.put_u32(failed.len() as u32);
                for (at, met) in failed {
                    out.put_u32(*at);
                    out.put_u8(u8::from(met.is_some()));
                    if let Some(met) = met {
                        out.put_u64(met.version);
                        out.put_u64(met.expires_at);
                    }
                }
            }
            Verdict::Invalid(invalid) => {
                out.put_u8(VERDICT_INVALID);
                out.put_u8(match invalid {
                    Invalid::CounterNotANumber => 1,
                    Invalid::CounterOverflow => 2,
                });
            }
            Verdict::RangeDeleted { deleted, next, arc } => {
                out.put_u8(VERDICT_RANGE_DELETED);
                out.put_u32(*deleted);
                out.put_u32(next.len() as u32);
                out.put_slice(next);
                out.put_u8(u8::from(arc.is_some()));
                if let Some((start, end)) = arc {
                    out.put_u64(*start);
                    out.put_u64(*end);
                }
            }
            Verdict::RangeTooLarge { limit } => {
                out.put_u8(VERDICT_RANGE_TOO_LARGE);
                out.put_u32(*limit);
            }
        }
        out.freeze()
    }

    pub(super) fn decode(bytes: Bytes) -> Result<StoredResult, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.u8()? != FORMAT_VERSION {
            return Err(Malformed("a result of an unknown format version"));
        }
        let (term, index, version) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let verdict = match reader.u8()? {
            VERDICT_APPLIED => {
                let (operations, counters) =
                    get_details(&mut reader, |reader| Ok(reader.u64()? as i64))?;
                Verdict::Applied { operations, counters }
            }
            VERDICT_CONDITION_FAILED => {
                let (operations, failed) =
                    get_details(&mut reader, |reader| reader.option(Met::get))?;
                Verdict::ConditionFailed { operations, failed }
            }
            VERDICT_INVALID => Verdict::Invalid(match reader.u8()? {
                1 => Invalid::CounterNotANumber,
                2 => Invalid::CounterOverflow,
                _ => return Err(Malformed("an unknown reason")),
            }),
            VERDICT_RANGE_DELETED => Verdict::RangeDeleted {
                deleted: reader.u32()?,
                next: reader.bytes()?,
                arc: reader.option(|reader| Ok((reader.u64()?, reader.u64()?)))?,
            },
            VERDICT_RANGE_TOO_LARGE => Verdict::RangeTooLarge { limit: reader.u32()? },
            _ => return Err(Malformed("an unknown verdict")),
        };
        reader.end()?;
        Ok(StoredResult { term, index, version, verdict })
    }
}

impl Met {
    fn get(reader: &mut Reader) -> Result<Met, Malformed> {
        Ok(Met { version: reader.u64()?, expires_at: reader.u64()? })
    }
}

/// The number of operations, and what is to be told of some of them.
fn get_details<T>(
    reader: &mut Reader,
    get: impl Fn(&mut Reader) -> Result<T, Malformed>,
) -> Result<(u32, Vec<(u32, T)>), Malformed> {
    let operations = reader.u32()?;
    if operations > OPERATIONS_MAX {
        return Err(Malformed("more operations than an entry holds"));
    }
    let count = reader.count(5)?;
    let mut details = Vec::with_capacity(count);
    for _ in 0..count {
        let at = reader.u32()?;
        if at >= operations {
            return Err(Malformed("an operation beyond the last"));
        }
        details.push((at, get(reader)?));
    }
    Ok((operations, details))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stored(verdict: Verdict) -> StoredResult {
        StoredResult { term: 1, index: 2, version: 3, verdict }
    }

    #[test]
    fn golden_bytes_of_results() {
        let head = b"\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03";
        let golden: [(Verdict, &[u8]); 7] = [
            (
                Verdict::Applied { operations: 2, counters: vec![(1, -2)] },
                b"\x01\0\0\0\x02\0\0\0\x01\0\0\0\x01\xff\xff\xff\xff\xff\xff\xff\xfe",
            ),
            (
                Verdict::ConditionFailed {
                    operations: 2,
                    failed: vec![(0, Some(Met { version: 7, expires_at: 9 })), (1, None)],
                },
                b"\x02\0\0\0\x02\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0\x07\
                  \0\0\0\0\0\0\0\x09\0\0\0\x01\0",
            ),
            (Verdict::Invalid(Invalid::CounterNotANumber), b"\x03\x01"),
            (Verdict::Invalid(Invalid::CounterOverflow), b"\x03\x02"),
            (
                Verdict::RangeDeleted { deleted: 3, next: "k\0".into(), arc: Some((1, 2)) },
                b"\x04\0\0\0\x03\0\0\0\x02k\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02",
            ),
            (
                Verdict::RangeDeleted { deleted: 0, next: Bytes::new(), arc: None },
                b"\x04\0\0\0\0\0\0\0\0\0",
            ),
            (Verdict::RangeTooLarge { limit: 9 }, b"\x05\0\0\0\x09"),
        ];
        for (verdict, tail) in golden {
            let bytes = Bytes::from([head, tail].concat());
            assert_eq!(stored(verdict.clone()).encode(), bytes);
            assert_eq!(StoredResult::decode(bytes), Ok(stored(verdict)));
        }
    }

    #[test]
    fn results_that_name_operations_beyond_their_last_are_refused() {
        let beyond = stored(Verdict::Applied { operations: 1, counters: vec![(1, 0)] });
        assert!(StoredResult::decode(beyond.encode()).is_err());
    }

    proptest! {
        #[test]
        fn decoding_any_result_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = StoredResult::decode(Bytes::from(bytes));
        }
    }
}
