//! Owns the token of a delete-range: up to which version it deletes, which arcs of the ring it is under
//! way in, from which key each goes on, and where on the ring nothing was begun. Does not delete.
//!
//! It names arcs, not shards: so it stays true over splits, merges and moves, and on any node. It
//! carries no request id: going on by it goes over what was done again, from where the last step was
//! *told* of, and finds nothing there that is as old as its version.

use bytes::{BufMut, Bytes};
use xxhash_rust::xxh3::Xxh3;

use super::{KIND_DELETE, TokenError, begin, finish, open};
use crate::limits::{DELETE_RANGE_LANES_MAX, DELETE_TOKEN_BYTES_MAX, KEY_BYTES_MAX};
use crate::ring::Arc;
use crate::shard_map::KeyspaceId;
use crate::v1;

/// Where a delete-range stands.
///
/// Invariants: the lanes are in ring order, do not overlap, and lie below `rest`; at most
/// [`DELETE_RANGE_LANES_MAX`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteToken {
    /// Of the delete-range.
    pub keyspace: KeyspaceId,
    /// Of the range: see [`DeleteToken::check`].
    pub digest: u64,
    /// Keys whose newest version lies above this one stay. 0 before it is fixed: such a token is of no
    /// step, and does not travel.
    pub version: u64,
    /// Under way.
    pub lanes: Vec<Lane>,
    /// From this position on nothing was begun; `None`: everything was.
    pub rest: Option<u64>,
}

/// An arc of which the keys below one are done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The arc.
    pub arc: Arc,
    /// Goes on from this key; empty: from the first.
    pub from: Bytes,
}

impl DeleteToken {
    /// The token of a delete-range over the whole ring that is about to begin.
    pub fn begin(request: &v1::DeleteRangeRequest, keyspace: KeyspaceId) -> DeleteToken {
        let digest = digest(request);
        DeleteToken { keyspace, digest, version: 0, lanes: Vec::new(), rest: Some(0) }
    }

    /// The token of one that is about to begin, and of this arc alone.
    pub fn of_arc(request: &v1::DeleteRangeRequest, keyspace: KeyspaceId, arc: Arc) -> DeleteToken {
        let lanes = vec![Lane { arc, from: Bytes::new() }];
        DeleteToken { keyspace, digest: digest(request), version: 0, lanes, rest: None }
    }

    /// Whether nothing is left.
    pub fn is_done(&self) -> bool {
        self.lanes.is_empty() && self.rest.is_none()
    }

    /// Begins with the rest of the ring up to the end of an arc that holds its first position.
    pub fn open_lane(&mut self, holding: Arc) {
        let Some(rest) = self.rest else { return };
        let end = holding.end();
        self.rest = (end != 0).then_some(end);
        let arc = Arc::new(rest, end).expect("an arc that holds a position ends behind it");
        self.lanes.push(Lane { arc, from: Bytes::new() });
    }

    /// A step that began where the lane at `start` does has covered the arc `covered`, and goes on
    /// from a key, or is done with it. What the lane has beyond that arc stays as it was. False when
    /// there is no such lane, or the arc does not hold its beginning: then nothing has changed.
    pub fn settle(&mut self, start: u64, covered: Arc, next: Option<Bytes>) -> bool {
        let at = self.lanes.iter().position(|lane| lane.arc.start().0 == start);
        let Some(at) = at.filter(|at| covered.contains(self.lanes[*at].arc.start())) else {
            return false;
        };
        let lane = self.lanes.remove(at);
        let beyond = lane.arc.split(crate::ring::Position(covered.end()));
        let (done, beyond) = match beyond.filter(|_| covered.end() != 0) {
            Some((done, beyond)) => (done, Some(beyond)),
            None => (lane.arc, None),
        };
        if let Some(beyond) = beyond {
            self.lanes.insert(at, Lane { arc: beyond, from: lane.from });
        }
        if let Some(next) = next {
            self.lanes.insert(at, Lane { arc: done, from: next });
        }
        self.unite();
        true
    }

    /// A step on the lane at `start` has left these of it. False when there is no such lane: then
    /// nothing has changed.
    pub fn replace(&mut self, start: u64, left: Vec<Lane>) -> bool {
        let Some(at) = self.lanes.iter().position(|lane| lane.arc.start().0 == start) else {
            return false;
        };
        self.lanes.splice(at..=at, left);
        self.unite();
        true
    }

    /// Keeps the lanes within their limit: neighbours go on as one, from the lower key.
    fn unite(&mut self) {
        while self.lanes.len() > DELETE_RANGE_LANES_MAX {
            let last = self.lanes.pop().expect("more than the limit");
            let before = self.lanes.last_mut().expect("more than the limit");
            // What lies between them is done; to go over it again finds nothing as old as the version.
            let arc = Arc::new(before.arc.start().0, last.arc.end());
            before.arc = arc.expect("lanes are in ring order");
            before.from = before.from.clone().min(last.from);
        }
    }

    /// Whether the token belongs to this range. The size of the steps and the shard may differ.
    pub fn check(
        &self,
        request: &v1::DeleteRangeRequest,
        keyspace: KeyspaceId,
    ) -> Result<(), TokenError> {
        if self.keyspace != keyspace {
            return Err(TokenError::OtherDelete("keyspace"));
        }
        if self.digest != digest(request) {
            return Err(TokenError::OtherDelete("range"));
        }
        Ok(())
    }

    /// As it travels.
    ///
    /// # Panics
    /// When a key is longer than the first behind a key can be, or no version is fixed.
    pub fn encode(&self) -> Bytes {
        assert!(self.version > 0, "a delete-range goes on under the version that was fixed for it");
        let keys: usize = self.lanes.iter().map(|lane| 20 + lane.from.len()).sum();
        let mut out = begin(KIND_DELETE, 29 + keys);
        out.put_u32(self.keyspace.0);
        out.put_u64(self.digest);
        out.put_u64(self.version);
        out.put_u8(self.rest.is_some().into());
        out.put_u64(self.rest.unwrap_or(0));
        for lane in &self.lanes {
            assert!(lane.from.len() <= FROM_BYTES_MAX, "a lane goes on behind a key at most");
            out.put_u64(lane.arc.start().0);
            out.put_u64(lane.arc.end());
            out.put_u32(lane.from.len() as u32);
            out.extend_from_slice(&lane.from);
        }
        finish(out, DELETE_TOKEN_BYTES_MAX)
    }

    /// Reads what [`DeleteToken::encode`] wrote. Never panics.
    pub fn decode(token: &[u8]) -> Result<DeleteToken, TokenError> {
        let mut body = open(KIND_DELETE, token, DELETE_TOKEN_BYTES_MAX)?;
        let (keyspace, digest) = (KeyspaceId(body.u32()?), body.u64()?);
        let version = body.u64()?;
        // The highest is how an entry says that it has no fence.
        if version == 0 || version == u64::MAX {
            return Err(TokenError::Damaged("no version"));
        }
        let (has_rest, rest) = (body.flag()?, body.u64()?);
        if !has_rest && rest != 0 {
            return Err(TokenError::Damaged("a rest that is none"));
        }
        let mut lanes: Vec<Lane> = Vec::new();
        // Where the next lane may begin; `None` behind the end of the ring.
        let mut free = Some(0);
        while !body.0.is_empty() {
            let (start, end) = (body.u64()?, body.u64()?);
            let arc = Arc::new(start, end).filter(|_| free.is_some_and(|free| free <= start));
            let arc = arc.ok_or(TokenError::Damaged("arcs out of order"))?;
            free = (end != 0).then_some(end);
            let len = body.u32()? as usize;
            let (key, behind) =
                body.0.split_at_checked(len).ok_or(TokenError::Damaged("too short"))?;
            if len > FROM_BYTES_MAX || lanes.len() == DELETE_RANGE_LANES_MAX {
                return Err(TokenError::Damaged("too many lanes, or a key too long"));
            }
            lanes.push(Lane { arc, from: Bytes::copy_from_slice(key) });
            body.0 = behind;
        }
        if has_rest && free.is_none_or(|free| rest < free) {
            return Err(TokenError::Damaged("arcs out of order"));
        }
        Ok(DeleteToken { keyspace, digest, version, lanes, rest: has_rest.then_some(rest) })
    }
}

/// The first key behind a key.
const FROM_BYTES_MAX: usize = KEY_BYTES_MAX + 1;

/// Tells ranges apart: XXH3-64 over each bound with its length before it.
fn digest(request: &v1::DeleteRangeRequest) -> u64 {
    let mut hash = Xxh3::new();
    for bound in [&request.start, &request.end, &request.prefix] {
        hash.update(&(bound.len() as u64).to_be_bytes());
        hash.update(bound);
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> v1::DeleteRangeRequest {
        v1::DeleteRangeRequest { start: "a".into(), prefix: "p".into(), ..Default::default() }
    }

    fn arc(start: u64, end: u64) -> Arc {
        Arc::new(start, end).unwrap()
    }

    fn lane(start: u64, end: u64, from: &str) -> Lane {
        Lane { arc: arc(start, end), from: Bytes::copy_from_slice(from.as_bytes()) }
    }

    fn token(lanes: Vec<Lane>, rest: Option<u64>) -> DeleteToken {
        DeleteToken { version: 9, lanes, rest, ..DeleteToken::begin(&request(), KeyspaceId(7)) }
    }

    #[test]
    fn the_ring_is_begun_arc_by_arc_to_its_end() {
        let mut token = DeleteToken::begin(&request(), KeyspaceId(7));
        token.open_lane(arc(0, 10));
        token.open_lane(arc(5, 20));
        assert_eq!(
            (token.lanes.clone(), token.rest),
            (vec![lane(0, 10, ""), lane(10, 20, "")], Some(20))
        );
        token.open_lane(arc(20, 0));
        token.open_lane(arc(20, 0));
        assert_eq!((token.lanes.len(), token.rest), (3, None));
        assert!(token.settle(10, arc(10, 20), None));
        assert!(token.settle(0, arc(0, 10), Some("k".into())));
        assert!(token.settle(20, arc(0, 0), None));
        assert_eq!(token.lanes, [lane(0, 10, "k")]);
        assert!(!token.is_done() && token.settle(0, arc(0, 10), None) && token.is_done());
    }

    #[test]
    fn a_step_on_part_of_a_lane_leaves_the_rest_as_it_was() {
        let mut split = token(vec![lane(0, 10, "c"), lane(10, 0, "")], None);
        assert!(!split.settle(0, arc(1, 10), None), "the arc does not hold the lane's beginning");
        assert!(!split.settle(1, arc(0, 10), None), "no lane begins there");
        assert!(split.settle(0, arc(0, 4), Some("m".into())));
        assert_eq!(split.lanes, [lane(0, 4, "m"), lane(4, 10, "c"), lane(10, 0, "")]);
        assert!(split.settle(10, arc(2, 20), None));
        assert_eq!(split.lanes, [lane(0, 4, "m"), lane(4, 10, "c"), lane(20, 0, "")]);
    }

    #[test]
    fn too_many_lanes_go_on_as_one_from_the_lower_key() {
        let most = DELETE_RANGE_LANES_MAX as u64;
        let mut lanes: Vec<_> = (0..most - 1).map(|at| lane(at, at + 1, "x")).collect();
        lanes.push(lane(most, most + 9, "k"));
        let mut token = token(lanes, Some(1 << 20));
        assert!(token.settle(most, arc(most, most + 1), Some("z".into())));
        assert_eq!(token.lanes.len(), DELETE_RANGE_LANES_MAX);
        assert_eq!(token.lanes.last(), Some(&lane(most, most + 9, "k")));
        assert_eq!(DeleteToken::decode(&token.encode()), Ok(token));
    }

    #[test]
    fn golden_bytes() {
        let token = token(vec![lane(1, 2, "k")], Some(2));
        let head = b"d\x01\0\0\0\x07";
        let version = b"\0\0\0\0\0\0\0\x09";
        let tail = b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\x01k";
        let framed = [&head[..], &token.digest.to_be_bytes(), version, tail].concat();
        let crc = crc32fast::hash(&framed).to_be_bytes();
        assert_eq!(token.encode(), [&framed[..], &crc].concat());
        assert_eq!(DeleteToken::decode(&token.encode()), Ok(token));
    }

    #[test]
    fn a_token_of_another_range_or_out_of_order_is_refused() {
        let good = token(vec![lane(0, 4, "")], Some(4));
        assert_eq!(good.check(&request(), KeyspaceId(7)), Ok(()));
        let other = v1::DeleteRangeRequest { end: "z".into(), ..request() };
        assert_eq!(good.check(&other, KeyspaceId(7)), Err(TokenError::OtherDelete("range")));
        assert_eq!(good.check(&request(), KeyspaceId(8)), Err(TokenError::OtherDelete("keyspace")));
        for bad in [
            token(vec![lane(4, 8, ""), lane(0, 4, "")], None),
            token(vec![lane(0, 8, ""), lane(4, 9, "")], None),
            token(vec![lane(0, 0, "")], Some(9)),
            token(vec![lane(0, 8, "")], Some(7)),
        ] {
            assert!(DeleteToken::decode(&bad.encode()).is_err(), "{bad:?}");
        }
        assert!(DeleteToken::decode(b"").is_err());
        // One without a version would be one without a fence.
        for byte in [0, u8::MAX] {
            let mut none = good.encode().to_vec();
            none.truncate(none.len() - 4);
            none[14..22].fill(byte);
            none.extend(crc32fast::hash(&none).to_be_bytes());
            assert_eq!(DeleteToken::decode(&none), Err(TokenError::Damaged("no version")));
        }
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(body in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut token = b"d\x01".to_vec();
            token.extend(body);
            token.extend(crc32fast::hash(&token).to_be_bytes());
            if let Ok(decoded) = DeleteToken::decode(&token) {
                prop_assert_eq!(decoded.encode(), token);
            }
        }
    }
}
