//! Entity rules: every key has one entity, and it is the same from wherever one looks.

use coracle_proto::entity::{EntityRule, EntityRuleError, successor};
use coracle_proto::v1;
use proptest::prelude::*;

/// Few byte values, so that delimiters, common prefixes and 0xff do occur.
fn key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0, b'/', b'a', b'b', 0xfe, 0xff]), 0..8)
}

fn rule() -> impl Strategy<Value = EntityRule> {
    prop_oneof![
        Just(EntityRule::Whole),
        prop::sample::select(vec![0, b'/', b'a', 0xff]).prop_map(EntityRule::Delimiter),
        (1_u32..6).prop_map(EntityRule::Prefix),
    ]
}

#[test]
fn each_rule_by_example() {
    let slash = EntityRule::Delimiter(b'/');
    let cases: [(EntityRule, &[u8], &[u8]); 9] = [
        (EntityRule::Whole, b"user/42/name", b"user/42/name"),
        (EntityRule::Whole, b"", b""),
        (slash, b"user/42/name", b"user/"),
        (slash, b"user/", b"user/"),
        (slash, b"/x", b"/"),
        (slash, b"user", b"user"),
        (EntityRule::Prefix(4), b"user/42", b"user"),
        (EntityRule::Prefix(4), b"user", b"user"),
        (EntityRule::Prefix(4), b"us", b"us"),
    ];
    for (rule, key, entity) in cases {
        assert_eq!(rule.entity(key), entity, "{rule:?} of {key:?}");
    }
}

#[test]
fn rules_that_cannot_be_are_refused() {
    use v1::entity_rule::Kind;
    let parse = |kind| EntityRule::try_from(&v1::EntityRule { kind });
    assert_eq!(parse(None), Err(EntityRuleError::Unknown));
    assert_eq!(parse(Some(Kind::Delimiter(256))), Err(EntityRuleError::Delimiter(256)));
    assert_eq!(parse(Some(Kind::Delimiter(255))), Ok(EntityRule::Delimiter(255)));
    assert_eq!(parse(Some(Kind::Prefix(0))), Err(EntityRuleError::Prefix(0)));
    assert_eq!(parse(Some(Kind::Prefix(4096))), Ok(EntityRule::Prefix(4096)));
    assert_eq!(parse(Some(Kind::Prefix(4097))), Err(EntityRuleError::Prefix(4097)));
    assert_eq!(EntityRule::from_request(None), Ok(EntityRule::Whole));
    let newer = v1::EntityRule { kind: None };
    assert_eq!(EntityRule::from_request(Some(&newer)), Err(EntityRuleError::Unknown));
}

#[test]
fn ranges_within_an_entity_by_example() {
    let slash = EntityRule::Delimiter(b'/');
    assert_eq!(slash.entity_of_range(b"u/a", b"u/b"), Some(&b"u/"[..]));
    assert_eq!(slash.entity_of_range(b"u/", b"u0"), Some(&b"u/"[..]));
    assert_eq!(slash.entity_of_range(b"u/", b"u00"), None);
    assert_eq!(slash.entity_of_range(b"u/", b""), None);
    assert_eq!(slash.entity_of_range(b"u", b"u/"), None);
    assert_eq!(EntityRule::Whole.entity_of_range(b"u", b"u\0"), Some(&b"u"[..]));
    assert_eq!(EntityRule::Prefix(1).entity_of_range(b"\xff", b""), Some(&b"\xff"[..]));
}

#[test]
fn successor_by_example() {
    assert_eq!(successor(b"ab"), Some(b"ac".to_vec()));
    assert_eq!(successor(b"a\xff\xff"), Some(b"b".to_vec()));
    assert_eq!(successor(b"\xff"), None);
    assert_eq!(successor(b""), None);
}

proptest! {
    #[test]
    fn the_entity_is_a_prefix_and_its_own_entity(rule in rule(), key in key()) {
        let entity = rule.entity(&key);
        prop_assert!(key.starts_with(entity));
        prop_assert_eq!(rule.entity(entity), entity);
        prop_assert_eq!(key.is_empty(), entity.is_empty());
    }

    #[test]
    fn an_entity_stands_together_in_key_order(rule in rule(), keys in [key(), key(), key()]) {
        let mut keys = keys;
        keys.sort();
        let [first, between, last] = &keys;
        if rule.entity(first) == rule.entity(last) {
            prop_assert_eq!(rule.entity(between), rule.entity(first));
        }
    }

    #[test]
    fn rules_survive_the_wire(rule in rule()) {
        prop_assert_eq!(EntityRule::try_from(&v1::EntityRule::from(rule)), Ok(rule));
    }

    #[test]
    fn a_prefix_that_fixes_the_entity_fixes_it_for_all(
        rule in rule(), prefix in key(), rest in key(),
    ) {
        let key = [prefix.clone(), rest].concat();
        if let Some(entity) = rule.entity_of_prefix(&prefix) {
            prop_assert_eq!(rule.entity(&key), entity);
        }
    }

    #[test]
    fn a_range_that_fixes_the_entity_fixes_it_for_all(
        rule in rule(), start in key(), end in key(), key in key(),
    ) {
        let inside = key >= start && (end.is_empty() || key < end);
        if let (true, Some(entity)) = (inside, rule.entity_of_range(&start, &end)) {
            prop_assert_eq!(rule.entity(&key), entity);
        }
    }

    #[test]
    fn the_successor_is_the_first_key_behind(prefix in key(), key in key()) {
        let inside = key.starts_with(&prefix);
        let before = successor(&prefix).is_none_or(|behind| key < behind);
        prop_assert_eq!(inside, key >= prefix && before);
    }
}
