//! What replicas of one group say to each other, and its encoding.
//!
//! Owns the questions and answers as bytes (`FORMAT.md`, *Messages*). The transport carries them
//! and knows only the lane and the replica that is addressed.

use bytes::{BufMut, Bytes, BytesMut};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    VoteRequest, VoteResponse,
};

use crate::entry::{
    decode_payload, decode_stored_membership, encode_payload, encode_stored_membership, get_log_id,
    get_vote, put_log_id, put_vote,
};
use crate::types::{NodeId, Position, SnapshotMeta, TypeConfig, Vote, log_id};
use crate::wire::{Malformed, Reader};

/// Every message begins with it; another version is refused, never guessed at.
const FORMAT: u8 = 1;

/// One question to a replica.
#[derive(Debug)]
pub(crate) enum Question {
    /// Entries, as part of a stream: answers come in the order of a session's questions, and a new
    /// session begins where the sender says so.
    Append { session: u64, first: bool, request: AppendEntriesRequest<TypeConfig> },
    /// An empty append, outside every stream.
    Heartbeat(AppendEntriesRequest<TypeConfig>),
    /// A vote, or only the question whether one would be given.
    Vote { pre: bool, request: VoteRequest<TypeConfig> },
    /// The leader asks this replica to campaign at once.
    Transfer(TransferLeaderRequest<TypeConfig>),
    /// Opens a snapshot transfer: what it holds, and a manifest of its files.
    SnapshotBegin { vote: Vote, transfer: u64, meta: SnapshotMeta, manifest: Bytes },
    /// One chunk of one file, as the manifest numbers them; its checksum stands there.
    SnapshotChunk { transfer: u64, file: u32, chunk: u32, data: Bytes },
    /// All pieces were sent: verify and install.
    SnapshotEnd { vote: Vote, transfer: u64 },
    /// A replica asks its leader: up to where must I have applied, to hold everything that was
    /// acknowledged before you take this?
    ReadPoint,
    /// A replica asks its leader to stamp above a version from now on; without one, above every
    /// version that was given before the leader takes this.
    Fix { version: Option<u64> },
    /// The leader asks whether this replica could campaign at once, before it hands over to it.
    MayLead,
}

/// The answer to a question.
#[derive(Debug)]
pub(crate) enum Answer {
    Append(StreamAppendResult<TypeConfig>),
    Vote(VoteResponse<TypeConfig>),
    /// False: the replica does not campaign (its vote moved on, its log is not flushed, its node has just
    /// restarted, or its disk stalls).
    Transfer(bool),
    /// The piece was taken.
    SnapshotTaken,
    /// Installed, or refused by this higher vote.
    SnapshotInstalled(Vote),
    /// Not taken, and why: no slot is free, the transfer is unknown, a checksum differs.
    SnapshotRefused(String),
    /// The leader has confirmed itself after it took the question.
    ReadPoint {
        index: u64,
    },
    /// No later write gets a version up to this one, under any leader; what has one up to it stands
    /// at or below the index.
    Fixed {
        version: u64,
        index: u64,
    },
    /// Neither a point nor a version.
    Refused(Refused),
}

/// Why a replica gives no read point and fixes no version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It does not lead, or could not confirm that it does. The node of the leader, if it knows it.
    NotLeader(Option<NodeId>),
    /// Too much waits already: come back after so many milliseconds.
    Overloaded(u64),
    /// Its clock strays, or the version lies too far ahead of it.
    ClockOutOfBound,
}

impl Question {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.size());
        out.put_u8(FORMAT);
        match self {
            Self::Append { session, first, request } => {
                out.put_u8(1);
                out.put_u64(*session);
                out.put_u8(u8::from(*first));
                put_append(&mut out, request);
            }
            Self::Heartbeat(request) => {
                out.put_u8(2);
                put_append(&mut out, request);
            }
            Self::Vote { pre, request } => {
                out.put_u8(3);
                out.put_u8(u8::from(*pre));
                put_vote(&mut out, &request.vote);
                put_log_id(&mut out, &request.last_log_id);
                out.put_u8(u8::from(request.leadership_transfer));
            }
            Self::Transfer(request) => {
                out.put_u8(4);
                put_vote(&mut out, request.from_leader());
                out.put_u64(*request.to_node_id());
                put_log_id(&mut out, &request.last_log_id().copied());
            }
            Self::SnapshotBegin { vote, transfer, meta, manifest } => {
                out.put_u8(5);
                put_vote(&mut out, vote);
                out.put_u64(*transfer);
                put_log_id(&mut out, &meta.last_log_id);
                put_bytes(&mut out, &encode_stored_membership(&meta.last_membership));
                put_bytes(&mut out, manifest);
            }
            Self::SnapshotChunk { transfer, file, chunk, data } => {
                out.put_u8(6);
                out.put_u64(*transfer);
                out.put_u32(*file);
                out.put_u32(*chunk);
                put_bytes(&mut out, data);
            }
            Self::SnapshotEnd { vote, transfer } => {
                out.put_u8(7);
                put_vote(&mut out, vote);
                out.put_u64(*transfer);
            }
            Self::ReadPoint => out.put_u8(8),
            Self::Fix { version } => {
                out.put_u8(9);
                put_option(&mut out, *version);
            }
            Self::MayLead => out.put_u8(10),
        }
        out.freeze()
    }

    pub(crate) fn decode(bytes: Bytes) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        check_format(&mut reader)?;
        let question = match reader.u8()? {
            1 => Self::Append {
                session: reader.u64()?,
                first: reader.bool()?,
                request: get_append(&mut reader)?,
            },
            2 => Self::Heartbeat(get_append(&mut reader)?),
            3 => {
                let pre = reader.bool()?;
                let mut request =
                    VoteRequest::new(get_vote(&mut reader)?, get_log_id(&mut reader)?);
                request.leadership_transfer = reader.bool()?;
                Self::Vote { pre, request }
            }
            4 => Self::Transfer(TransferLeaderRequest::new(
                get_vote(&mut reader)?,
                reader.u64()?,
                get_log_id(&mut reader)?,
            )),
            5 => Self::SnapshotBegin {
                vote: get_vote(&mut reader)?,
                transfer: reader.u64()?,
                meta: SnapshotMeta {
                    last_log_id: get_log_id(&mut reader)?,
                    last_membership: decode_stored_membership(reader.bytes()?)?,
                },
                manifest: reader.bytes()?,
            },
            6 => Self::SnapshotChunk {
                transfer: reader.u64()?,
                file: reader.u32()?,
                chunk: reader.u32()?,
                data: reader.bytes()?,
            },
            7 => Self::SnapshotEnd { vote: get_vote(&mut reader)?, transfer: reader.u64()? },
            8 => Self::ReadPoint,
            9 => Self::Fix { version: reader.option(Reader::u64)? },
            10 => Self::MayLead,
            _ => return Err(Malformed("an unknown kind of question")),
        };
        reader.end()?;
        Ok(question)
    }

    /// About how many bytes the encoding takes.
    fn size(&self) -> usize {
        match self {
            Self::Append { request, .. } | Self::Heartbeat(request) => {
                let bodies: usize = request
                    .entries
                    .iter()
                    .map(|entry| match &entry.payload {
                        openraft::EntryPayload::Normal(proposal) => proposal.0.len() + 32,
                        _ => 256,
                    })
                    .sum();
                bodies + 96
            }
            Self::SnapshotBegin { manifest, .. } => manifest.len() + 512,
            Self::SnapshotChunk { data, .. } => data.len() + 64,
            _ => 96,
        }
    }
}

impl Answer {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        out.put_u8(FORMAT);
        match self {
            Self::Append(Ok(matched)) => {
                out.put_u8(1);
                put_log_id(&mut out, matched);
            }
            Self::Append(Err(StreamAppendError::Conflict(at))) => {
                out.put_u8(2);
                put_log_id(&mut out, &Some(*at));
            }
            Self::Append(Err(StreamAppendError::HigherVote(vote))) => {
                out.put_u8(3);
                put_vote(&mut out, vote);
            }
            Self::Vote(response) => {
                out.put_u8(4);
                put_vote(&mut out, &response.vote);
                put_log_id(&mut out, &response.last_log_id);
                out.put_u8(u8::from(response.vote_granted));
            }
            Self::Transfer(accepted) => {
                out.put_u8(5);
                out.put_u8(u8::from(*accepted));
            }
            Self::SnapshotTaken => out.put_u8(6),
            Self::SnapshotInstalled(vote) => {
                out.put_u8(7);
                put_vote(&mut out, vote);
            }
            Self::SnapshotRefused(why) => {
                out.put_u8(8);
                put_bytes(&mut out, why.as_bytes());
            }
            Self::ReadPoint { index } => {
                out.put_u8(9);
                out.put_u64(*index);
            }
            Self::Fixed { version, index } => {
                out.put_u8(10);
                out.put_u64(*version);
                out.put_u64(*index);
            }
            Self::Refused(why) => {
                out.put_u8(11);
                match why {
                    Refused::NotLeader(leader) => {
                        out.put_u8(1);
                        put_option(&mut out, leader.map(|node| node.0));
                    }
                    Refused::Overloaded(retry_after_ms) => {
                        out.put_u8(2);
                        out.put_u64(*retry_after_ms);
                    }
                    Refused::ClockOutOfBound => out.put_u8(3),
                }
            }
        }
        out.freeze()
    }

    pub(crate) fn decode(bytes: Bytes) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        check_format(&mut reader)?;
        let answer = match reader.u8()? {
            1 => Self::Append(Ok(get_log_id(&mut reader)?)),
            2 => {
                let at = get_log_id(&mut reader)?.ok_or(Malformed("a conflict at nothing"))?;
                Self::Append(Err(StreamAppendError::Conflict(at)))
            }
            3 => Self::Append(Err(StreamAppendError::HigherVote(get_vote(&mut reader)?))),
            4 => {
                let (vote, last) = (get_vote(&mut reader)?, get_log_id(&mut reader)?);
                Self::Vote(VoteResponse::new(vote, last, reader.bool()?))
            }
            5 => Self::Transfer(reader.bool()?),
            6 => Self::SnapshotTaken,
            7 => Self::SnapshotInstalled(get_vote(&mut reader)?),
            8 => Self::SnapshotRefused(String::from_utf8_lossy(&reader.bytes()?).into_owned()),
            9 => Self::ReadPoint { index: reader.u64()? },
            10 => Self::Fixed { version: reader.u64()?, index: reader.u64()? },
            11 => Self::Refused(match reader.u8()? {
                1 => Refused::NotLeader(reader.option(Reader::u64)?.map(NodeId)),
                2 => Refused::Overloaded(reader.u64()?),
                3 => Refused::ClockOutOfBound,
                _ => return Err(Malformed("an unknown kind of refusal")),
            }),
            _ => return Err(Malformed("an unknown kind of answer")),
        };
        reader.end()?;
        Ok(answer)
    }
}

fn check_format(reader: &mut Reader) -> Result<(), Malformed> {
    if reader.u8()? == FORMAT { Ok(()) } else { Err(Malformed("an unknown format version")) }
}

fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

fn put_option(out: &mut BytesMut, number: Option<u64>) {
    out.put_u8(u8::from(number.is_some()));
    if let Some(number) = number {
        out.put_u64(number);
    }
}

fn put_append(out: &mut BytesMut, request: &AppendEntriesRequest<TypeConfig>) {
    put_vote(out, &request.vote);
    put_log_id(out, &request.prev_log_id);
    put_log_id(out, &request.leader_commit);
    out.put_u32(request.entries.len() as u32);
    for entry in &request.entries {
        out.put_u64(entry.log_id.committed_leader_id().term);
        out.put_u64(entry.log_id.index());
        put_bytes(out, &encode_payload(entry));
    }
}

fn get_append(reader: &mut Reader) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let vote = get_vote(reader)?;
    let prev_log_id = get_log_id(reader)?;
    let leader_commit = get_log_id(reader)?;
    let count = reader.count(20)?;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let id = log_id(Position { term: reader.u64()?, index: reader.u64()? });
        entries.push(decode_payload(id, reader.bytes()?)?);
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_questions_for_reads() {
        let golden: [(Question, &[u8]); 4] = [
            (Question::MayLead, &[1, 10]),
            (Question::ReadPoint, &[1, 8]),
            (Question::Fix { version: None }, &[1, 9, 0]),
            (Question::Fix { version: Some(0x0102) }, &[1, 9, 1, 0, 0, 0, 0, 0, 0, 1, 2]),
        ];
        for (question, bytes) in golden {
            assert_eq!(&question.encode()[..], bytes);
            let again = Question::decode(Bytes::from_static(bytes)).expect("as it was written");
            assert_eq!(format!("{again:?}"), format!("{question:?}"));
            let longer = [bytes, &[0]].concat();
            Question::decode(longer.into()).expect_err("bytes behind the end");
            Question::decode(bytes[..bytes.len() - 1].to_vec().into()).expect_err("cut");
        }
    }

    #[test]
    fn golden_bytes_of_answers_for_reads() {
        let golden: [(Answer, &[u8]); 6] = [
            (Answer::ReadPoint { index: 7 }, &[1, 9, 0, 0, 0, 0, 0, 0, 0, 7]),
            (
                Answer::Fixed { version: 5, index: 6 },
                &[1, 10, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 6],
            ),
            (Answer::Refused(Refused::NotLeader(None)), &[1, 11, 1, 0]),
            (
                Answer::Refused(Refused::NotLeader(Some(NodeId(3)))),
                &[1, 11, 1, 1, 0, 0, 0, 0, 0, 0, 0, 3],
            ),
            (Answer::Refused(Refused::Overloaded(50)), &[1, 11, 2, 0, 0, 0, 0, 0, 0, 0, 50]),
            (Answer::Refused(Refused::ClockOutOfBound), &[1, 11, 3]),
        ];
        for (answer, bytes) in golden {
            assert_eq!(&answer.encode()[..], bytes);
            let again = Answer::decode(Bytes::from_static(bytes)).expect("as it was written");
            assert_eq!(format!("{again:?}"), format!("{answer:?}"));
            Answer::decode(bytes[..bytes.len() - 1].to_vec().into()).expect_err("cut");
        }
    }
}
