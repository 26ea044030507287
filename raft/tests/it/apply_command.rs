//! The bytes of commands: pinned, read back, and refused when they are not ours.

use std::collections::BTreeMap;

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_raft::command::{
    AbsorbShard, AnnounceMerge, Change, Command, Condition, DecodeError, DeleteRange, EndMerge,
    FreezeShard, NO_FENCE, Operation, Owned, Planned, Request, RequestId, SplitShard, Stamped,
};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::history::{Pin, Settings};
use coracle_raft::rules::Rules;
use coracle_raft::types::Position;
use proptest::collection::vec;
use proptest::prelude::*;

/// One of everything: what the golden bytes pin.
fn sample() -> Stamped {
    let operation = |key: &'static [u8], condition, change| Operation {
        key: Bytes::from_static(key),
        condition,
        change,
    };
    let request = |sequence, operations| Request {
        id: RequestId { client: 0xC1, sequence, birth_ms: 0xB1, lowest_unanswered: 1 },
        keyspace: 2,
        position: 0x0102_0304_0506_0708,
        epoch: 5,
        operations,
    };
    Stamped {
        stamp: 0x0A_0000,
        ceiling: 0x0B_0000,
        command: Command::Requests(vec![
            request(
                9,
                vec![
                    operation(
                        b"a",
                        None,
                        Change::Put { value: Bytes::from_static(b"vv"), ttl_ms: 1000 },
                    ),
                    operation(b"", Some(Condition::IfAbsent), Change::Delete),
                ],
            ),
            request(
                10,
                vec![
                    operation(b"b\0", Some(Condition::IfVersion(7)), Change::Increment { by: -2 }),
                    operation(
                        b"c",
                        Some(Condition::IfValue(Bytes::from_static(b"x"))),
                        Change::Check,
                    ),
                ],
            ),
        ]),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_bytes_of_every_command() {
    let id = |sequence: &str| {
        format!("00000000000000c1{sequence}00000000000000b10000000000000001")
            + "00000002"
            + "0102030405060708"
            + "0000000000000005"
    };
    let requests = "0101".to_string()
        + "00000000000a0000"
        + "00000000000b0000"
        + "00000002"
        + &id("0000000000000009")
        + "00000002"
        + "0000000161" // key
        + "00" // no condition
        + "0100000000000003e8000000027676" // put, ttl, value
        + "00000000" // the empty key
        + "01" // if absent
        + "02" // delete
        + &id("000000000000000a")
        + "00000002"
        + "000000026200"
        + "020000000000000007" // if version
        + "03fffffffffffffffe" // increment by -2
        + "0000000163"
        + "030000000178" // if value
        + "04"; // check
    assert_eq!(hex(&sample().encode()), requests);

    let stamped = |command| Stamped { stamp: 1, ceiling: 2, command };
    assert_eq!(hex(&stamped(Command::Advance).encode()), "010200000000000000010000000000000002");
    let shard = Descriptor { shard: 3, arc: Some((4, 0)), epoch: 1 };
    assert_eq!(
        hex(&stamped(Command::Describe(shard)).encode()),
        "010300000000000000010000000000000002".to_string()
            + "0100000000000000030000000000000001"
            + "0100000000000000040000000000000000"
    );
    let settings = Settings { keyspace: 7, history_ms: 0x0102, revision: 3 };
    assert_eq!(
        hex(&stamped(Command::Settings(vec![settings])).encode()),
        "010400000000000000010000000000000002".to_string()
            + "00000001"
            + "0000000700000000000001020000000000000003"
    );
    let pin = Pin { keyspace: 7, version: 0x0A_0001, until_ms: 0x0B };
    assert_eq!(
        hex(&stamped(Command::Pin(pin)).encode()),
        "010500000000000000010000000000000002".to_string()
            + "0000000700000000000a0001000000000000000b"
    );
    assert_eq!(
        hex(&stamped(Command::Split(split())).encode()),
        "010600000000000000010000000000000002".to_string()
            + "0000000000000005" // epoch
            + "00000000000000030000000000000009" // membership: term, index
            + "8000000000000000" // at
            + "0000000000000002" // child
            + "00000002"
            + "000000000000000b0000000000000015"
            + "000000000000000c0000000000000016"
            + "01" // rules
            + "0000000000000007" // seed
            + "00000003"
            + "000000010100000000" // whole
            + "00000002020000002f" // delimiter
            + "000000030300000004" // prefix
    );
}

#[test]
fn golden_bytes_of_the_commands_of_a_merge() {
    let stamped = |command| hex(&Stamped { stamp: 1, ceiling: 2, command }.encode());
    let head = |kind: &str| format!("01{kind}00000000000000010000000000000002");
    let planned = "0000000000000005" // epoch
        .to_owned()
        + "00000000000000030000000000000009"; // membership: term, index
    let no_rules = "01000000000000000700000000";
    let rules = Rules { hash_seed: 7, keyspaces: BTreeMap::new() };
    let plan = Planned { epoch: 5, membership: Position { term: 3, index: 9 } };
    let merge = "000000000000004d";
    let announce = AnnounceMerge {
        planned: plan,
        merge: 77,
        absorbs: true,
        replicas: [11, 12].into(),
        rules: rules.clone(),
    };
    assert_eq!(
        stamped(Command::Announce(announce)),
        head("07")
            + &planned
            + merge
            + "01"
            + "00000002000000000000000b000000000000000c" // replicas
            + no_rules
    );
    let freeze = FreezeShard { planned: plan, merge: 77 };
    assert_eq!(stamped(Command::Freeze(freeze)), head("08") + &planned + merge);
    let end = EndMerge { merge: 77, epoch: 5 };
    assert_eq!(stamped(Command::Thaw(end)), head("09") + merge + "0000000000000005");
    let absorb = AbsorbShard {
        planned: plan,
        merge: 77,
        other: Descriptor { shard: 2, arc: Some((1 << 63, 0)), epoch: 4 },
        frozen_at: 6,
        replicas: BTreeMap::from([(11, 21)]),
        rules,
    };
    assert_eq!(
        stamped(Command::Absorb(absorb)),
        head("0a")
            + &planned
            + merge
            + "0100000000000000020000000000000004" // descriptor: shard, epoch
            + "0180000000000000000000000000000000" // its arc
            + "0000000000000006"
            + "00000001000000000000000b0000000000000015"
            + no_rules
    );
    assert_eq!(stamped(Command::EndMerge(end)), head("0b") + merge + "0000000000000005");
}

fn split() -> SplitShard {
    SplitShard {
        planned: Planned { epoch: 5, membership: Position { term: 3, index: 9 } },
        at: 1 << 63,
        child: 2,
        replicas: BTreeMap::from([(11, 21), (12, 22)]),
        rules: Rules {
            hash_seed: 7,
            keyspaces: BTreeMap::from([
                (1, EntityRule::Whole),
                (2, EntityRule::Delimiter(b'/')),
                (3, EntityRule::Prefix(4)),
            ]),
        },
    }
}

fn delete_range(range: DeleteRange) -> Operation {
    let key = Bytes::from_static(b"a");
    Operation { key, condition: None, change: Change::DeleteRange(range) }
}

#[test]
fn golden_bytes_of_delete_ranges() {
    let bytes = |operation| {
        let id = RequestId { client: 1, sequence: 1, birth_ms: 1, lowest_unanswered: 1 };
        let operations = vec![operation];
        let request = Request { id, keyspace: 1, position: 0, epoch: 0, operations };
        let command = Command::Requests(vec![request]);
        let encoded = Stamped { stamp: 0, ceiling: 0, command }.encode();
        // Behind the entry's head and the request's.
        hex(&encoded[22 + 56..])
    };
    let (fence, end) = (NO_FENCE, Bytes::new());
    let whole = DeleteRange { end, limit: 10_000, fence, whole: true, owned: None };
    assert_eq!(
        bytes(delete_range(whole)),
        "0000000161".to_string() + "00" + "050000000000002710" + "ffffffffffffffff" + "0100"
    );
    let rules = [
        (EntityRule::Whole, "0100000000"),
        (EntityRule::Delimiter(b'/'), "020000002f"),
        (EntityRule::Prefix(4_096), "0300001000"),
    ];
    for (rule, code) in rules {
        let owned = Some(Owned { rule, hash_seed: 0x2A });
        let end = Bytes::from_static(b"z");
        let range = DeleteRange { end, limit: 1, fence: 7, whole: false, owned };
        let golden = "0000000161".to_string()
            + "00"
            + "05000000017a"
            + "00000001"
            + "0000000000000007"
            + "0001"
            + code;
        assert_eq!(bytes(delete_range(range)), golden + "000000000000002a");
    }
}

#[test]
fn unknown_version_and_unknown_kinds_are_errors() {
    let good = sample().encode();
    let changed = |at: usize, to: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = to;
        Stamped::decode(&Bytes::from(bytes))
    };
    assert_eq!(changed(0, 2), Err(DecodeError::UnknownVersion { found: 2 }));
    assert_eq!(changed(1, 99), Err(DecodeError::UnknownKind { what: "command", found: 99 }));
    // Behind the entry's head and the request's.
    let operation = 22 + 56;
    assert_eq!(
        changed(operation + 5, 9),
        Err(DecodeError::UnknownKind { what: "condition", found: 9 })
    );
    assert_eq!(
        changed(operation + 6, 9),
        Err(DecodeError::UnknownKind { what: "change", found: 9 })
    );
    assert!(matches!(Stamped::decode(&Bytes::new()), Err(DecodeError::Malformed(_))));
}

#[test]
fn decoded_keys_and_values_share_the_entrys_memory() {
    let entry = sample().encode();
    let Command::Requests(requests) = Stamped::decode(&entry).expect("own bytes").command else {
        panic!("requests came back as something else");
    };
    let span = entry.as_ptr_range();
    let operation = &requests[0].operations[0];
    let Change::Put { value, .. } = &operation.change else { panic!("the put has changed") };
    assert!(span.contains(&operation.key.as_ptr()) && span.contains(&value.as_ptr()));
}

fn bytes_up_to(len: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..len).prop_map(Bytes::from)
}

fn owned() -> impl Strategy<Value = Option<Owned>> {
    let rule = prop_oneof![
        Just(EntityRule::Whole),
        any::<u8>().prop_map(EntityRule::Delimiter),
        any::<u32>().prop_map(EntityRule::Prefix),
    ];
    proptest::option::of(
        (rule, any::<u64>()).prop_map(|(rule, hash_seed)| Owned { rule, hash_seed }),
    )
}

fn operations() -> impl Strategy<Value = Operation> {
    let condition = prop_oneof![
        Just(None),
        Just(Some(Condition::IfAbsent)),
        any::<u64>().prop_map(|version| Some(Condition::IfVersion(version))),
        bytes_up_to(20).prop_map(|value| Some(Condition::IfValue(value))),
    ];
    let change = prop_oneof![
        (bytes_up_to(40), any::<u64>()).prop_map(|(value, ttl_ms)| Change::Put { value, ttl_ms }),
        Just(Change::Delete),
        any::<i64>().prop_map(|by| Change::Increment { by }),
        Just(Change::Check),
        (bytes_up_to(20), any::<u32>(), any::<u64>(), any::<bool>(), owned()).prop_map(
            |(end, limit, fence, whole, owned)| {
                Change::DeleteRange(DeleteRange { end, limit, fence, whole, owned })
            }
        ),
    ];
    (bytes_up_to(20), condition, change).prop_map(|(key, condition, change)| Operation {
        key,
        condition,
        change,
    })
}

fn requests() -> impl Strategy<Value = Request> {
    let numbers = (any::<[u64; 6]>(), any::<u32>());
    (numbers, vec(operations(), 0..4)).prop_map(|((numbers, keyspace), operations)| {
        let [client, sequence, birth_ms, lowest_unanswered, position, epoch] = numbers;
        let id = RequestId { client, sequence, birth_ms, lowest_unanswered };
        Request { id, keyspace, position, epoch, operations }
    })
}

fn entries() -> impl Strategy<Value = Stamped> {
    let command = prop_oneof![
        4 => vec(requests(), 0..4).prop_map(Command::Requests),
        1 => Just(Command::Advance),
        1 => (any::<u64>(), 1..u64::MAX, any::<bool>()).prop_map(|(shard, epoch, meta)| {
            let arc = (!meta).then_some((epoch / 2, epoch));
            Command::Describe(Descriptor { shard, arc, epoch })
        }),
        1 => vec(any::<(u32, u64, u64)>(), 0..4).prop_map(|all| Command::Settings(
            all.into_iter()
                .map(|(keyspace, history_ms, revision)| Settings { keyspace, history_ms, revision })
                .collect(),
        )),
        1 => any::<(u32, u64, u64)>().prop_map(|(keyspace, version, until_ms)| {
            Command::Pin(Pin { keyspace, version, until_ms })
        }),
        1 => any::<[u64; 8]>().prop_map(|[epoch, term, index, at, child, one, other, hash_seed]| {
            let planned = Planned { epoch, membership: Position { term, index } };
            let replicas = BTreeMap::from([(one, other)]);
            let keyspaces = BTreeMap::from([(at as u32, EntityRule::Prefix(child as u32))]);
            let rules = Rules { hash_seed, keyspaces };
            Command::Split(SplitShard { planned, at, child, replicas, rules })
        }),
    ];
    (any::<u64>(), any::<u64>(), command).prop_map(|(stamp, ceiling, command)| Stamped {
        stamp,
        ceiling,
        command,
    })
}

proptest! {
    #[test]
    fn what_was_encoded_comes_back_and_its_length_was_foretold(entry in entries()) {
        let bytes = entry.encode();
        if let Command::Requests(_) | Command::Settings(_) = &entry.command {
            prop_assert_eq!(bytes.len(), entry.command.size());
        }
        prop_assert!(bytes.len() <= entry.command.size());
        prop_assert_eq!(Stamped::decode(&bytes), Ok(entry));
    }

    #[test]
    fn decoding_any_bytes_never_panics(bytes in vec(any::<u8>(), 0..200)) {
        let _ = Stamped::decode(&Bytes::from(bytes));
    }

    /// One byte of a real entry changed, or the entry cut: decoded to something else or refused.
    #[test]
    fn decoding_damaged_entries_never_panics(
        entry in entries(),
        at in any::<prop::sample::Index>(),
        to in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let bytes = entry.encode();
        let at = at.index(bytes.len());
        if cut {
            prop_assert!(Stamped::decode(&bytes.slice(..at)).is_err());
        } else {
            let mut bytes = bytes.to_vec();
            bytes[at] = to;
            let _ = Stamped::decode(&Bytes::from(bytes));
        }
    }
}
