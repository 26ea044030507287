//! Carries splits and merges out: asks replicas how they are, tells leaders what comes next.
//!
//! Owns the loop of the meta group's leader; a node's answer to its orders (`orders`), and what operators ask
//! (`operator`), or the cluster by itself (`unasked`). What happens next is decided in `reshape`.

mod orders;
mod operator;
mod unasked;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::shard_map::NodeId;
use coracle_proto::{peer, v1};
use peer::ReshapeStep;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::unasked::Unasked;
use super::points::Point;
use super::reshape::{self, Entry, Next, On, Seen};
use super::{COMMAND_TIMEOUT, Cluster, PUBLISH_TIMEOUT, Target};
use crate::records::Snapshot;
use crate::records::operations::has_ended;

/// Between two looks at what is to be done.
const RESHAPE_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks at one that has just begun something: routes of before are refused meanwhile.
const SOON: Duration = Duration::from_millis(10);
/// An operation's turn: then others have theirs.
const TURN: Duration = Duration::from_secs(2);
/// A replica of a shard that serves nothing is not waited for longer.
const FREEZE_PROBE_TIMEOUT: Duration = Duration::from_millis(150);
/// How often a group may refuse an order, outright, before the operation is given up.
const REFUSALS_MAX: u32 = 20;
/// Hops to whoever leads.
const HOPS_MAX: usize = 3;

/// What a controller remembers, only as long as it leads the meta group.
#[derive(Default)]
struct Reshaping {
    unasked: Unasked,
    /// By operation.
    orders: BTreeMap<u64, Orders>,
}

/// What became of the orders of an operation.
#[derive(Debug, Clone, Copy, Default)]
struct Orders {
    /// How many were given, which finds another node where nobody leads.
    given: usize,
    /// How often a group has refused one, since a step was last taken.
    refusals: u32,
    /// The node that refused the last one.
    refused_by: Option<u64>,
}

/// Why an order was not carried out.
struct NotDone {
    why: String,
    /// The group understood it, and will not: by whom it was led.
    refused_by: Option<u64>,
}

impl Cluster {
    /// Carries splits and merges on again and again, where this node leads the meta group.
    pub(super) async fn reshape_all(&self, stop: &CancellationToken) {
        let mut memory = Reshaping::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RESHAPE_INTERVAL) => {}
            }
            if !self.leads_meta() {
                memory = Reshaping::default();
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.reshape_once(&mut memory) => {}
            }
        }
    }

    async fn reshape_once(&self, memory: &mut Reshaping) {
        let Ok(snapshot) = self.records.load().await else { return };
        self.remove_orphans(&snapshot).await;
        self.unasked(&snapshot, &mut memory.unasked).await;
        let reshapes =
            |known: &&v1::ClusterOperation| known.split.is_some() || known.merge.is_some();
        let ids: Vec<u64> =
            snapshot.operations.active().filter(reshapes).map(|known| known.id).collect();
        memory.orders.retain(|id, _| ids.contains(id));
        let turns = ids.into_iter().map(|id| {
            let orders = memory.orders.get(&id).copied().unwrap_or_default();
            async move { (id, self.turn(id, orders).await) }
        });
        memory.orders.extend(futures_util::future::join_all(turns).await);
    }

    /// Replicas of shards that the map has no more: their nodes are told, as often as it takes.
    async fn remove_orphans(&self, snapshot: &Snapshot) {
        let known = self.knowledge.lock().clone();
        let is_orphan = |leaving: &&peer::LeavingReplica| {
            snapshot.map.shards.iter().all(|shard| shard.id != leaving.shard)
        };
        let tell = snapshot.leaving.iter().filter(is_orphan).map(|leaving| {
            let node = snapshot.map.nodes.iter().find(|node| node.id == leaving.node);
            let gone = node.is_none_or(|node| node.state() == v1::NodeState::Gone);
            let is_silent = known.silent.contains_key(&leaving.node);
            async move {
                let over = match is_silent {
                    true => gone,
                    false => self.remove_orphan(snapshot, leaving).await,
                };
                over.then_some(leaving.replica)
            }
        });
        let over: Vec<u64> =
            futures_util::future::join_all(tell).await.into_iter().flatten().collect();
        if over.is_empty() {
            return;
        }
        let forgotten = self.records.change_all(|snapshot| {
            let before = snapshot.leaving.len();
            snapshot.leaving.retain(|leaving| !over.contains(&leaving.replica));
            Ok(snapshot.leaving.len() < before)
        });
        if let Err(error) = forgotten.await {
            tracing::info!(%error, "replicas that are gone could not be forgotten");
            return;
        }
        for replica in over {
            self.holding.at(Point::Forgotten, 0, replica).await;
        }
    }

    /// Has a node destroy a replica, unless another one there may still need its files.
    async fn remove_orphan(&self, snapshot: &Snapshot, leaving: &peer::LeavingReplica) -> bool {
        if let Some(needed_by) = reshape::needed_by(snapshot, leaving) {
            let status = self.probe(leaving.taken_by, *needed_by, PUBLISH_TIMEOUT).await;
            if !status.is_some_and(|status| reshape::has_taken(leaving, &status)) {
                return false;
            }
        }
        let peer::LeavingReplica { shard, replica, node, .. } = *leaving;
        self.holding.at(Point::Destroy, shard, replica).await;
        let told = self.tell_destroy(node, peer::DestroyReplica { shard, replica }).await;
        if told.is_ok() {
            self.holding.at(Point::Destroyed, shard, replica).await;
        }
        told.is_ok()
    }

    /// One operation's turn: as far as it goes. Returns what became of its orders.
    async fn turn(&self, id: u64, mut orders: Orders) -> Orders {
        let until = Instant::now() + TURN;
        while Instant::now() < until {
            let Ok(snapshot) = self.records.load().await else { break };
            let Some(operation) = snapshot.operations.active().find(|known| known.id == id) else {
                break;
            };
            let seen = self.seen(&snapshot, operation, orders.refused_by).await;
            let given_up = orders.refusals >= REFUSALS_MAX
                && !operation.cancelling
                && !reshape::is_decided(operation);
            let next = match given_up {
                true => Next::Enter(Entry::GiveUp { why: operation.message.clone() }),
                false => reshape::next(&snapshot, operation, &seen),
            };
            match next {
                Next::Wait(why) => {
                    self.say(id, &why).await;
                    break;
                }
                Next::Look => tokio::time::sleep(SOON).await,
                Next::Enter(entry) => {
                    tracing::info!(operation = id, ?entry, "a shard is reshaped");
                    (orders.refusals, orders.refused_by) = (0, None);
                    // Planned again when the map has heard who its members are.
                    let again = matches!(entry, Entry::SplitAgain { .. });
                    if !self.enter(operation, &entry).await || again {
                        break;
                    }
                }
                Next::HandOver { shard, from, to } => {
                    tracing::info!(operation = id, shard, from, to, "another is to lead");
                    let hand_over = peer::HandOver { shard, to_node: to };
                    if let Err(why) = self.tell_hand_over(NodeId(from), hand_over).await {
                        self.say(id, &why).await;
                        break;
                    }
                    // It leads as soon as it says so.
                    tokio::time::sleep(SOON).await;
                }
                Next::Ask(order) => {
                    let leader = seen.leader(order.shard).map(NodeId);
                    let to = leader.or_else(|| self.whom(&snapshot, order.shard, orders.given));
                    orders.given += 1;
                    let Some(to) = to else { break };
                    if let Err(NotDone { why, refused_by }) =
                        self.give(operation, to, with_rules(*order, &snapshot)).await
                    {
                        tracing::info!(operation = id, why, "an order was not heeded");
                        orders.refusals += u32::from(refused_by.is_some());
                        orders.refused_by = refused_by;
                        self.say(id, &why).await;
                        break;
                    }
                }
            }
        }
        orders
    }

    /// Gives an order, between the points around it.
    async fn give(
        &self,
        operation: &v1::ClusterOperation,
        to: NodeId,
        order: peer::Reshape,
    ) -> Result<(), NotDone> {
        let (shard, step) = (order.shard, order.step());
        tracing::info!(operation = operation.id, ?step, shard, "an order");
        let (before, after) = reshape::around(operation, step);
        self.holding.at(before, shard, 0).await;
        self.tell_reshape(to, order).await?;
        self.holding.at(after, shard, 0).await;
        Ok(())
    }

    /// Records why it does not go on, once.
    async fn say(&self, id: u64, why: &str) {
        let said = self.records.change_all(|snapshot| {
            let mut list = snapshot.operations.list.iter_mut();
            let operation = list.find(|known| known.id == id && known.message != why);
            Ok(operation.map(|known| known.message = why.to_owned()).is_some())
        });
        if let Err(error) = said.await {
            tracing::debug!(%error, "a reason could not be recorded");
        }
    }

    async fn enter(&self, operation: &v1::ClusterOperation, entry: &Entry) -> bool {
        let (id, on, now_ms) = (operation.id, On::of(operation), self.records.now_ms());
        let mut entered = false;
        let changed = self.records.change_all(|snapshot| {
            entered = reshape::enter(snapshot, id, (on, entry), now_ms);
            Ok(entered)
        });
        match changed.await {
            Ok(snapshot) if entered => {
                self.hold_behind(operation, entry, &snapshot).await;
                let own = self.map.update_from_proto(&snapshot.map);
                // Where epochs have risen routes of before are refused: who asks next is to find the new.
                let epochs = match entry {
                    Entry::Split { .. } | Entry::Taken { .. } => true,
                    Entry::Back { .. } | Entry::Ended { .. } => true,
                    Entry::SplitAgain { .. } => {
                        let shard = operation.split.as_ref().map(|split| split.shard);
                        self.knowledge.lock().handed_over.extend(shard);
                        true
                    }
                    _ => false,
                };
                if own.is_ok() && epochs {
                    self.publish(&snapshot.map).await;
                }
                true
            }
            Ok(_) => true,
            Err(error) => {
                tracing::info!(%error, operation = id, "a step could not be recorded");
                false
            }
        }
    }

    /// Behind what was recorded.
    async fn hold_behind(&self, known: &v1::ClusterOperation, entry: &Entry, now: &Snapshot) {
        let split = known.split.as_ref().map(|split| split.shard);
        let merge = known.merge.as_ref().map(|merge| merge.left);
        let shard = split.or(merge).unwrap_or(0);
        self.holding.at(reshape::behind(entry), shard, 0).await;
        let known = now.operations.find(known.id);
        let ended = known.is_some_and(|known| has_ended(known.state()));
        self.holding.at(ended.then_some(Point::OperationEnded), shard, 0).await;
    }

    /// What the replicas say that matter for the operation's step.
    async fn seen(
        &self,
        snapshot: &Snapshot,
        operation: &v1::ClusterOperation,
        refused_by: Option<u64>,
    ) -> Seen {
        let (known, now) = (self.knowledge.lock().clone(), Instant::now());
        let freezes = operation.merge.as_ref().is_some_and(|it| it.step() == v1::MergeStep::Freeze);
        let timeout = if freezes { FREEZE_PROBE_TIMEOUT } else { PUBLISH_TIMEOUT };
        let asked = reshape::asked(snapshot, operation).into_iter();
        let asked = asked.filter(|(_, replica)| !known.silent.contains_key(&replica.node));
        let ask = asked.map(|(shard, replica)| async move {
            let status = self.probe(shard, replica, timeout).await?;
            Some((replica.id, status))
        });
        let replicas = futures_util::future::join_all(ask).await.into_iter().flatten().collect();
        let nodes = &snapshot.map.nodes;
        let lost = nodes.iter().filter(|node| known.lost(node, &snapshot.operations, now));
        Seen {
            replicas,
            silent: known.silent.keys().copied().collect(),
            lost: lost.map(|node| node.id).collect(),
            refused_by,
            now_ms: self.records.now_ms(),
            hold_ms: self.holding.ms(),
        }
    }

    /// Whoever may lead a shard, where none of its replicas says so.
    fn whom(&self, snapshot: &Snapshot, shard: u64, orders: usize) -> Option<NodeId> {
        let known = self.knowledge.lock().leaders.get(&shard).copied();
        let shard = snapshot.map.shards.iter().find(|known| known.id == shard)?;
        let voters = shard.replicas.iter().filter(|r| r.role() == v1::ReplicaRole::Voter);
        let voters: Vec<u64> = voters.map(|replica| replica.node).collect();
        let any = voters.get(orders % voters.len().max(1)).copied();
        known.filter(|_| orders.is_multiple_of(2)).or(any).map(NodeId)
    }

    /// Has a group's leader do it, wherever it is.
    async fn tell_reshape(&self, to: NodeId, order: peer::Reshape) -> Result<Bytes, NotDone> {
        let not_done = |why: String| NotDone { why, refused_by: None };
        let mut to = to;
        for _ in 0..HOPS_MAX {
            let answer = match self.membership.identity().is_some_and(|(_, own)| own == to) {
                true => self.reshape_here(order.clone()).await,
                false => {
                    let kind = Kind::Reshape(order.clone());
                    let asked = self.commands.command(Target::Node(to), kind, COMMAND_TIMEOUT);
                    asked.await.map_err(not_done)?
                }
            };
            if answer.error.is_empty() {
                return Ok(answer.body);
            }
            if answer.ask_node == 0 || answer.ask_node == to.0 {
                let refused_by = (!answer.reason.is_empty()).then_some(to.0);
                return Err(NotDone { why: answer.error, refused_by });
            }
            to = NodeId(answer.ask_node);
        }
        Err(not_done("nobody leads the group for long".to_owned()))
    }

    /// Where a shard might be split, by its leader.
    async fn split_points(
        &self,
        snapshot: &Snapshot,
        shard: u64,
    ) -> Result<peer::SplitPoints, String> {
        let step = ReshapeStep::Points.into();
        let mut why = format!("nobody leads s{shard}");
        for orders in 0..HOPS_MAX {
            let Some(to) = self.whom(snapshot, shard, orders) else { break };
            let order = peer::Reshape { shard, step, ..Default::default() };
            match self.tell_reshape(to, with_rules(order, snapshot)).await {
                Ok(body) => {
                    return peer::SplitPoints::decode(body).map_err(|error| error.to_string());
                }
                Err(not_done) => why = not_done.why,
            }
        }
        Err(why)
    }
}

/// The rules of keyspaces, out of the records: read after the epoch that the order names.
fn with_rules(order: peer::Reshape, snapshot: &Snapshot) -> peer::Reshape {
    let keyspaces = snapshot.map.keyspaces.iter();
    peer::Reshape {
        keyspaces: keyspaces.map(|keyspace| keyspace.encode_to_vec().into()).collect(),
        hash_seed: snapshot.map.hash_seed,
        ..order
    }
}
