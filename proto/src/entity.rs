//! Owns entity rules: which part of a key decides where it lives. Does not hash it (see
//! [`crate::ring`]) and does not know keyspaces (see [`crate::shard_map`]).

use crate::limits::KEY_BYTES_MAX;
use crate::reason::Fault;
use crate::v1;

/// How a keyspace finds the entity in a key. Fixed when the keyspace is created: another rule would
/// put the same keys in other places.
///
/// Invariants:
/// - the entity is a prefix of the key, so the keys of an entity stand together in key order;
/// - a key alone determines its entity, so one key never lives in two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum EntityRule {
    /// The whole key: every key is an entity of its own.
    #[default]
    Whole,
    /// Up to and including the first occurrence of this byte; the whole key where it does not occur.
    Delimiter(u8),
    /// The first n bytes, 1 to [`KEY_BYTES_MAX`]; the whole key when it is shorter.
    Prefix(u32),
}

/// A rule that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntityRuleError {
    /// The message has no rule that this version knows. Never read as [`EntityRule::Whole`]: a rule
    /// of a newer version would then send keys to wrong places.
    #[error("entity rule is missing or of a newer version")]
    Unknown,
    /// Not a byte.
    #[error("entity delimiter {0} is not a byte (0 to 255)")]
    Delimiter(u32),
    /// 0 would make the whole keyspace one entity, on one shard; more than a key never matches.
    #[error("entity prefix of {0} bytes, allowed are 1 to {KEY_BYTES_MAX} (KEY_BYTES_MAX)")]
    Prefix(u32),
}

impl EntityRule {
    /// The part of `key` that is hashed.
    pub fn entity<'a>(&self, key: &'a [u8]) -> &'a [u8] {
        let end = match *self {
            EntityRule::Whole => key.len(),
            EntityRule::Delimiter(delimiter) => {
                key.iter().position(|byte| *byte == delimiter).map_or(key.len(), |at| at + 1)
            }
            EntityRule::Prefix(bytes) => key.len().min(bytes as usize),
        };
        &key[..end]
    }

    /// The entity of all keys that begin with `prefix`; `None` where they have several.
    pub fn entity_of_prefix<'a>(&self, prefix: &'a [u8]) -> Option<&'a [u8]> {
        let end = match *self {
            EntityRule::Whole => return None,
            EntityRule::Delimiter(delimiter) => {
                prefix.iter().position(|byte| *byte == delimiter)? + 1
            }
            EntityRule::Prefix(bytes) => bytes as usize,
        };
        prefix.get(..end)
    }

    /// The entity of all keys in `[start, end)` (an empty `end` is no bound); `None` where they may
    /// have several. A scan of such a range touches one shard.
    pub fn entity_of_range<'a>(&self, start: &'a [u8], end: &[u8]) -> Option<&'a [u8]> {
        if end.strip_prefix(start) == Some(&[0]) {
            return Some(self.entity(start));
        }
        let entity = self.entity_of_prefix(start)?;
        match successor(entity) {
            Some(behind) => (!end.is_empty() && end <= &behind[..]).then_some(entity),
            None => Some(entity),
        }
    }

    /// The rule that a request asks for, where none means [`EntityRule::Whole`].
    pub fn from_request(rule: Option<&v1::EntityRule>) -> Result<EntityRule, EntityRuleError> {
        rule.map_or(Ok(EntityRule::Whole), EntityRule::try_from)
    }
}

impl TryFrom<&v1::EntityRule> for EntityRule {
    type Error = EntityRuleError;

    fn try_from(rule: &v1::EntityRule) -> Result<EntityRule, EntityRuleError> {
        use v1::entity_rule::Kind;
        match rule.kind {
            None => Err(EntityRuleError::Unknown),
            Some(Kind::Whole(_)) => Ok(EntityRule::Whole),
            Some(Kind::Delimiter(value)) => u8::try_from(value)
                .map(EntityRule::Delimiter)
                .map_err(|_| EntityRuleError::Delimiter(value)),
            Some(Kind::Prefix(bytes)) if (1..=KEY_BYTES_MAX as u32).contains(&bytes) => {
                Ok(EntityRule::Prefix(bytes))
            }
            Some(Kind::Prefix(bytes)) => Err(EntityRuleError::Prefix(bytes)),
        }
    }
}

impl From<EntityRule> for v1::EntityRule {
    fn from(rule: EntityRule) -> v1::EntityRule {
        use v1::entity_rule::Kind;
        let kind = match rule {
            EntityRule::Whole => Kind::Whole(v1::WholeKey {}),
            EntityRule::Delimiter(byte) => Kind::Delimiter(byte.into()),
            EntityRule::Prefix(bytes) => Kind::Prefix(bytes),
        };
        v1::EntityRule { kind: Some(kind) }
    }
}

impl From<EntityRuleError> for Fault {
    fn from(error: EntityRuleError) -> Fault {
        Fault::invalid("entity_rule", error.to_string())
    }
}

/// The keys of `[start, end)` that begin with `prefix`, as one range: its first key, and the first
/// behind it. Empty bounds are none; `None` when no key can be in it.
pub fn bounds(start: &[u8], end: &[u8], prefix: &[u8]) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let first = start.max(prefix).to_vec();
    let behind = successor(prefix);
    let end = match (!end.is_empty()).then(|| end.to_vec()) {
        Some(end) => Some(behind.map_or(end.clone(), |behind| behind.min(end))),
        None => behind,
    };
    let is_empty = end.as_ref().is_some_and(|end| *end <= first);
    (!is_empty).then_some((first, end))
}

/// The first key behind all keys that begin with `prefix`; `None` when there is none. The end of a
/// prefix scan.
pub fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut behind = prefix[..=last].to_vec();
    behind[last] += 1;
    Some(behind)
}
