//! Tokens: what was seen is never forgotten, and no bytes make decoding panic.

use bytes::Bytes;
use coracle_proto::limits::{
    KEY_BYTES_MAX, SCAN_TOKEN_BYTES_MAX, SESSION_SHARDS_MAX, SESSION_TOKEN_BYTES_MAX,
};
use coracle_proto::shard_map::{KeyspaceId, ShardId};
use coracle_proto::token::{Need, ScanToken, Seen, SessionToken, TokenError};
use coracle_proto::v1;
use proptest::prelude::*;

fn seen(term: u64, index: u64) -> Seen {
    Seen { term, index }
}

fn session() -> impl Strategy<Value = SessionToken> {
    prop::collection::vec((0..6_u64, 0..4_u64, any::<u64>(), any::<u64>()), 0..12).prop_map(
        |observed| {
            let mut token = SessionToken::default();
            for (shard, term, index, version) in observed {
                token.observe(ShardId(shard), seen(term, index), version);
            }
            token
        },
    )
}

fn request() -> v1::ScanRequest {
    v1::ScanRequest {
        start: "a".into(),
        end: "z".into(),
        prefix: "p".into(),
        limit: 100,
        ..Default::default()
    }
}

/// The format is part of the contract: tokens outlive the version that made them.
#[test]
fn golden_bytes() {
    let mut session = SessionToken::default();
    session.observe(ShardId(3), seen(2, 258), 0x0102_0304_0506_0708);
    let expected = "7301\
        00\
        0102030405060708\
        000000000000000300000000000000020000000000000102";
    assert_eq!(hex_without_crc(&session.encode()), expected);

    let scan = ScanToken {
        version: 0x11,
        keyspace: KeyspaceId(7),
        last_key: "key".into(),
        remaining: Some(5),
        reverse: true,
        digest: 0x0a0b_0c0d_0e0f_1011,
    };
    let expected = "6301\
        0101\
        0000000000000005\
        0000000000000011\
        00000007\
        0a0b0c0d0e0f1011\
        6b6579";
    assert_eq!(hex_without_crc(&scan.encode()), expected);
    assert_eq!(coracle_proto::token::scan_digest(&request()), DIGEST);
}

/// XXH3-64 (seed 0) of the lengths and bounds of [`request`], its limit and its direction.
const DIGEST: u64 = 0x0b42_c107_addf_6554;

fn hex_without_crc(token: &[u8]) -> String {
    token[..token.len() - 4].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_session_never_forgets() {
    let mut token = SessionToken::default();
    assert_eq!(token.need(ShardId(1)), Need::Nothing);
    token.observe(ShardId(1), seen(2, 10), 100);
    token.observe(ShardId(1), seen(1, 99), 90);
    assert_eq!(token.need(ShardId(1)), Need::Applied(seen(2, 10)));
    assert_eq!(token.version(), 100);
    token.observe(ShardId(1), seen(2, 11), 101);
    assert_eq!(token.need(ShardId(1)), Need::Applied(seen(2, 11)));
    assert_eq!(SessionToken::decode(b""), Ok(SessionToken::default()));
}

#[test]
fn a_full_session_reads_linearizably() {
    let mut token = SessionToken::default();
    for shard in 0..SESSION_SHARDS_MAX as u64 {
        token.observe(ShardId(shard), seen(1, 1), shard);
    }
    assert!(!token.overflowed());
    assert!(token.encode().len() <= SESSION_TOKEN_BYTES_MAX);
    assert_eq!(SessionToken::decode(&token.encode()), Ok(token.clone()));

    let mut more = SessionToken::default();
    more.observe(ShardId(u64::MAX), seen(1, 1), 0);
    more.merge(&token);
    assert!(more.overflowed());
    assert_eq!(more.need(ShardId(1)), Need::Linearizable);
    assert_eq!(more.need(ShardId(u64::MAX)), Need::Linearizable);
    assert_eq!(more.version(), SESSION_SHARDS_MAX as u64 - 1);
    assert_eq!(SessionToken::decode(&more.encode()), Ok(more.clone()));
    token.merge(&more);
    assert_eq!(token, more);
}

#[test]
fn a_scan_token_belongs_to_its_scan() {
    let token = ScanToken::begin(&request(), KeyspaceId(1), 42);
    assert_eq!((token.remaining, token.last_key.len()), (Some(100), 0));
    assert_eq!(token.check(&request(), KeyspaceId(1)), Ok(()));
    assert_eq!(token.check(&request(), KeyspaceId(2)), Err(TokenError::OtherScan("keyspace")));

    type Change = fn(&mut v1::ScanRequest);
    let others: [Change; 6] = [
        |scan| scan.start = "b".into(),
        |scan| scan.end = "y".into(),
        |scan| scan.prefix = Bytes::new(),
        |scan| scan.limit = 99,
        |scan| scan.reverse = true,
        // The same bytes, cut elsewhere.
        |scan| (scan.start, scan.end) = ("az".into(), "".into()),
    ];
    for change in others {
        let mut other = request();
        change(&mut other);
        assert!(token.check(&other, KeyspaceId(1)).is_err(), "{other:?}");
    }
    let mut same = request();
    same.only_shard = Some(v1::Route { shard: 9, shard_epoch: 2 });
    same.resume_token = token.encode();
    same.keys_only = true;
    assert_eq!(token.check(&same, KeyspaceId(1)), Ok(()));

    let next = token.advance("pq".into(), 30).advance("pr".into(), 80);
    assert_eq!((next.remaining, &next.last_key[..], next.version), (Some(0), &b"pr"[..], 42));
    let longest = token.advance(vec![1; KEY_BYTES_MAX].into(), 0).encode();
    assert!(longest.len() <= SCAN_TOKEN_BYTES_MAX);
    assert!(ScanToken::decode(&longest).is_ok());
}

#[test]
fn what_is_wrong_is_said() {
    let token = ScanToken::begin(&request(), KeyspaceId(1), 42).encode();
    let mut newer = token.to_vec();
    newer[1] = 2;
    assert_eq!(ScanToken::decode(&newer), Err(TokenError::Format(2)));
    let damaged = |why| Err(TokenError::Damaged(why));
    assert_eq!(ScanToken::decode(&token[..token.len() - 1]), damaged("checksum does not match"));
    assert_eq!(ScanToken::decode(b""), damaged("too short"));
    let other_kind = SessionToken::default().encode();
    assert_eq!(ScanToken::decode(&other_kind), damaged("of another kind"));
}

/// A frame that is whole, whatever stands in it.
fn framed(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut token = [&[kind, 1], body].concat();
    token.extend(crc32fast::hash(&token).to_be_bytes());
    token
}

proptest! {
    #[test]
    fn sessions_survive(token in session()) {
        prop_assert_eq!(SessionToken::decode(&token.encode()), Ok(token));
    }

    #[test]
    fn merging_is_the_most_of_both(a in session(), b in session(), c in session()) {
        let merge = |a: &SessionToken, b: &SessionToken| {
            let mut merged = a.clone();
            merged.merge(b);
            merged
        };
        let ab = merge(&a, &b);
        prop_assert_eq!(&ab, &merge(&b, &a));
        prop_assert_eq!(merge(&ab, &c), merge(&a, &merge(&b, &c)));
        prop_assert_eq!(merge(&ab, &a), ab.clone());
        for (shard, place) in a.seen().chain(b.seen()) {
            let Need::Applied(merged) = ab.need(shard) else { panic!("forgotten") };
            prop_assert!(merged >= place);
        }
        prop_assert_eq!(ab.version(), a.version().max(b.version()));
    }

    #[test]
    fn scans_survive(
        version: u64, keyspace: u32, last in prop::collection::vec(any::<u8>(), 0..40),
        remaining: Option<u64>, reverse: bool, digest: u64,
    ) {
        let (keyspace, last_key) = (KeyspaceId(keyspace), last.into());
        let token = ScanToken { version, keyspace, last_key, remaining, reverse, digest };
        prop_assert_eq!(ScanToken::decode(&token.encode()), Ok(token));
    }

    /// Also past the checksum: whatever is accepted writes itself back the same.
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(0..3_u8, 0..70), random: Vec<u8>) {
        for body in [&bytes, &random] {
            let _ = SessionToken::decode(body);
            let _ = ScanToken::decode(body);
            let whole = framed(b's', body);
            if let Ok(token) = SessionToken::decode(&whole) {
                prop_assert_eq!(token.encode(), whole);
            }
            let whole = framed(b'c', body);
            if let Ok(token) = ScanToken::decode(&whole) {
                prop_assert_eq!(token.encode(), whole);
            }
        }
    }

    #[test]
    fn every_changed_bit_is_found(token in session(), bit: prop::sample::Index) {
        let mut bytes = token.encode().to_vec();
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(SessionToken::decode(&bytes).is_err());
    }
}
