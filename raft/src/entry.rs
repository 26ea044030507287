//! An entry's payload as bytes: in the log and on the wire alike.
//!
//! The first byte tells blank (0), membership (255) and command (its format version, between)
//! apart, so that a command's bytes serve unchanged from proposal to apply.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes, BytesMut};
use openraft::EntryPayload;

use crate::types::{Entry, LogId, Membership, NodeId, Place, Proposal, StoredMembership, Vote};
use crate::wire::{Malformed, Reader};

const BLANK: u8 = 0;
const MEMBERSHIP: u8 = 255;

pub(crate) fn encode_payload(entry: &Entry) -> Bytes {
    match &entry.payload {
        EntryPayload::Blank => Bytes::from_static(&[BLANK]),
        EntryPayload::Normal(proposal) => {
            assert!(
                !matches!(proposal.0.first(), None | Some(&BLANK) | Some(&MEMBERSHIP)),
                "a command's first byte is its format version, between blank and membership"
            );
            proposal.0.clone()
        }
        EntryPayload::Membership(membership) => {
            let mut out = BytesMut::new();
            out.put_u8(MEMBERSHIP);
            put_membership(&mut out, membership);
            out.freeze()
        }
    }
}

pub(crate) fn decode_payload(id: LogId, bytes: Bytes) -> Result<Entry, Malformed> {
    let payload = match bytes.first() {
        None => return Err(Malformed("an empty entry")),
        Some(&BLANK) => EntryPayload::Blank,
        Some(&MEMBERSHIP) => {
            let mut reader = Reader::new(bytes.slice(1..));
            let membership = get_membership(&mut reader)?;
            reader.end()?;
            EntryPayload::Membership(membership)
        }
        Some(_) => EntryPayload::Normal(Proposal(bytes)),
    };
    Ok(Entry { log_id: id, payload })
}

fn put_membership(out: &mut BytesMut, membership: &Membership) {
    let configs = membership.get_joint_config();
    out.put_u32(configs.len() as u32);
    for config in configs {
        out.put_u32(config.len() as u32);
        for id in config {
            out.put_u64(*id);
        }
    }
    let nodes: Vec<_> = membership.nodes().collect();
    out.put_u32(nodes.len() as u32);
    for (id, place) in nodes {
        out.put_u64(*id);
        out.put_u64(place.node.0);
    }
}

fn get_membership(reader: &mut Reader) -> Result<Membership, Malformed> {
    let mut configs = Vec::new();
    for _ in 0..reader.count(4)? {
        let mut config = BTreeSet::new();
        for _ in 0..reader.count(8)? {
            config.insert(reader.u64()?);
        }
        configs.push(config);
    }
    let mut nodes = BTreeMap::new();
    for _ in 0..reader.count(16)? {
        let id = reader.u64()?;
        nodes.insert(id, Place { node: NodeId(reader.u64()?) });
    }
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|_| Malformed("a membership that contradicts itself"))
}

pub(crate) fn put_log_id(out: &mut BytesMut, id: &Option<LogId>) {
    out.put_u8(u8::from(id.is_some()));
    if let Some(id) = id {
        out.put_slice(&crate::types::id_bytes(id));
    }
}

pub(crate) fn get_log_id(reader: &mut Reader) -> Result<Option<LogId>, Malformed> {
    reader.option(|reader| {
        let (term, index) = (reader.u64()?, reader.u64()?);
        Ok(crate::types::log_id(crate::types::Position { term, index }))
    })
}

pub(crate) fn put_vote(out: &mut BytesMut, vote: &Vote) {
    out.put_u64(vote.leader_id.term);
    out.put_u64(vote.leader_id.voted_for);
    out.put_u8(u8::from(vote.committed));
}

pub(crate) fn get_vote(reader: &mut Reader) -> Result<Vote, Malformed> {
    let (term, replica) = (reader.u64()?, reader.u64()?);
    Ok(if reader.bool()? { Vote::new_committed(term, replica) } else { Vote::new(term, replica) })
}

/// A membership with the position of the entry that brought it: the state's own record of it.
pub(crate) fn encode_stored_membership(stored: &StoredMembership) -> Bytes {
    let mut out = BytesMut::new();
    put_log_id(&mut out, stored.log_id());
    put_membership(&mut out, stored.membership());
    out.freeze()
}

pub(crate) fn decode_stored_membership(bytes: Bytes) -> Result<StoredMembership, Malformed> {
    let mut reader = Reader::new(bytes);
    let id = get_log_id(&mut reader)?;
    let membership = get_membership(&mut reader)?;
    reader.end()?;
    Ok(StoredMembership::new(id, membership))
}
