//! Owns what a read finds in a fake cluster: which replica may answer, up to where that one has come,
//! and at which version expiry is judged.

use bytes::Bytes;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::token::{Need, SessionToken};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_response::Result as Answer;
use tokio::time::Instant;

use super::model::{Held, Model, Place, version_at};
use crate::topology::{NodeId, ShardId};

/// Why a read has no answer now.
pub(super) enum Missed {
    /// It will not have one.
    Refused(Fault),
    /// The replica has to come further. `at`: when it will have, if that is known.
    Behind { at: Option<Instant>, fault: Fault },
}

impl From<Fault> for Missed {
    fn from(fault: Fault) -> Missed {
        Missed::Refused(fault)
    }
}

impl From<limits::LimitError> for Missed {
    fn from(error: limits::LimitError) -> Missed {
        Missed::Refused(error.into())
    }
}

/// How fresh a read must be.
#[derive(Clone, Copy)]
enum Fresh {
    Any,
    Session { index: u64, judged_from: u64 },
    Bounded { lag_ms: u64 },
    Newest { judged_from: u64 },
    At(u64),
}

/// The replica that answers, and what it may show.
struct Window {
    node: NodeId,
    /// Versions above it are not there yet.
    version: u64,
    /// Expiry is judged at this version, or at the reader's if that is higher.
    judged_at: u64,
    served: v1::Served,
}

impl Model {
    /// Reads one key.
    pub(super) fn get(&mut self, asked: NodeId, get: &v1::GetRequest) -> Result<Answer, Missed> {
        limits::check_key(&get.key)?;
        let place = self.place(&get.keyspace, &get.key, get.route.as_ref())?;
        let (entry, served) = self.look(asked, place, &get.key, get.read.as_ref())?;
        Ok(Answer::Get(v1::GetResponse { entry, served: Some(served) }))
    }

    /// Reads many keys.
    pub(super) fn batch_get(
        &mut self,
        asked: NodeId,
        batch: &v1::BatchGetRequest,
    ) -> Result<Answer, Missed> {
        limits::check_batch_get(&batch.keys)?;
        let (mut items, mut bytes) = (Vec::with_capacity(batch.keys.len()), 0);
        for key in &batch.keys {
            let place = self.place(&batch.keyspace, key, None)?;
            let (entry, served) = self.look(asked, place, key, batch.read.as_ref())?;
            bytes += entry.as_ref().map_or(0, |entry| entry.value.len());
            limits::check_batch_get_answer(bytes)?;
            items.push(v1::BatchGetItem { entry, served: Some(served) });
        }
        Ok(Answer::BatchGet(v1::BatchGetResponse { items }))
    }

    fn look(
        &mut self,
        asked: NodeId,
        place: Place,
        key: &Bytes,
        read: Option<&v1::ReadOptions>,
    ) -> Result<(Option<v1::Entry>, v1::Served), Missed> {
        let fresh = fresh(read, place.shard)?;
        let window = self.window(asked, place, fresh)?;
        let held = self.held(place.keyspace, key, window.version).cloned();
        let can_expire = held.as_ref().is_some_and(|held| held.expires_at != 0);
        let mut served = window.served;
        if can_expire || matches!(fresh, Fresh::Session { .. } | Fresh::At(_)) {
            served.judged_at = window.judged_at;
            // What is gone for this reader is gone for everybody's later writes; though a token may
            // say anything.
            let ahead = limits::CLOCK_BOUND.as_millis() as u64;
            let promised = window.judged_at.min(version_at(self.now_ms() + ahead));
            let group = self.groups.get_mut(&place.shard).expect("a place is of a shard");
            group.clock = group.clock.max(promised);
        }
        let held = held.filter(|held| !held.is_absent_at(window.judged_at));
        served.node = window.node.0;
        Ok((held.as_ref().map(Held::entry), served))
    }

    fn window(&mut self, asked: NodeId, place: Place, fresh: Fresh) -> Result<Window, Missed> {
        let now = self.stamp();
        let newest = |judged_at| (u64::MAX, judged_at);
        let node = match self.has_replica(asked, place.shard) {
            true => asked,
            false => self.leader_from(asked, place.shard)?,
        };
        if matches!(fresh, Fresh::Newest { .. } | Fresh::At(_)) {
            // A replica that does not lead asks the leader: that is no hop of the request.
            let hops = self.hops;
            self.leader_from(node, place.shard)?;
            self.hops = hops;
        }
        let leads = self.leader(place.shard) == Some(node);
        let clock = self.groups[&place.shard].clock;
        let step = self.seen(node, place.shard);
        let (version, judged_at) = match fresh {
            Fresh::Newest { judged_from } => {
                let wanted = self.groups[&place.shard].last;
                if step.index < wanted.index {
                    let lag = self.lag(node, place.shard);
                    let at = self.groups[&place.shard].reached_at(wanted.index, lag);
                    return Err(Missed::Behind { at, fault: self.too_stale(node, place) });
                }
                newest(now.max(judged_from).max(clock))
            }
            Fresh::At(version) => {
                self.check_readable(place, version)?;
                (version, version)
            }
            Fresh::Any if leads => newest(now.max(clock)),
            Fresh::Any => (step.version, now.max(step.version)),
            Fresh::Bounded { lag_ms } => {
                let lag = self.lag(node, place.shard);
                if lag.as_millis() as u64 > lag_ms {
                    return Err(Missed::Behind { at: None, fault: self.too_stale(node, place) });
                }
                if leads { newest(now.max(clock)) } else { (step.version, now.max(step.version)) }
            }
            Fresh::Session { index, judged_from } => {
                if step.index < index {
                    let lag = self.lag(node, place.shard);
                    let at = self.groups[&place.shard].reached_at(index, lag);
                    return Err(Missed::Behind { at, fault: self.too_stale(node, place) });
                }
                let version = if leads { u64::MAX } else { step.version };
                (version, now.max(judged_from).max(step.version))
            }
        };
        let mut served = self.served(place, step, node);
        served.leader = leads;
        if !matches!(fresh, Fresh::Newest { .. } | Fresh::At(_)) {
            served.staleness_ms = self.lag(node, place.shard).as_millis() as u64;
        }
        Ok(Window { node, version, judged_at, served })
    }

    /// Whether a version is neither gone nor ahead of all clocks.
    pub(super) fn check_readable(&self, place: Place, version: u64) -> Result<(), Fault> {
        let oldest = self.history_threshold(place.keyspace);
        if version < oldest {
            let message = "the version is older than the keyspace's history";
            return Err(Fault::new(Reason::VersionGone, message)
                .with(metadata::SHARD, place.shard)
                .with(metadata::OLDEST_VERSION, oldest));
        }
        let ahead = limits::CLOCK_BOUND.as_millis() as u64;
        if version > version_at(self.now_ms() + ahead) {
            let message = "the version lies ahead of the shard's clock";
            return Err(
                Fault::new(Reason::ClockOutOfBound, message).with(metadata::SHARD, place.shard)
            );
        }
        Ok(())
    }

    fn too_stale(&self, node: NodeId, place: Place) -> Fault {
        let lag = self.lag(node, place.shard);
        let fault = Fault::new(Reason::TooStale, "the replica is staler than the read allows");
        self.towards_leader(fault.with(metadata::LAG_MS, lag.as_millis()), place.shard)
    }
}

fn fresh(read: Option<&v1::ReadOptions>, shard: ShardId) -> Result<Fresh, Fault> {
    limits::check_read(read)?;
    let Some(read) = read else { return Ok(Fresh::Newest { judged_from: 0 }) };
    if read.at_version > 0 {
        return Ok(Fresh::At(read.at_version));
    }
    Ok(match read.consistency() {
        v1::Consistency::Unspecified | v1::Consistency::Linearizable => {
            Fresh::Newest { judged_from: 0 }
        }
        v1::Consistency::Any => Fresh::Any,
        v1::Consistency::Bounded => Fresh::Bounded { lag_ms: read.max_staleness_ms },
        v1::Consistency::Session => {
            let token = SessionToken::decode(&read.session)
                .map_err(|error| Fault::invalid("read.session", error.to_string()))?;
            let judged_from = token.version();
            match token.need(shard) {
                Need::Nothing => Fresh::Session { index: 0, judged_from },
                Need::Applied(seen) => Fresh::Session { index: seen.index, judged_from },
                Need::Linearizable => Fresh::Newest { judged_from },
            }
        }
    })
}
