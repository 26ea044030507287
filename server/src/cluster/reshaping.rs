//! Carries splits and merges out: asks replicas how they are, tells leaders what comes next.
//!
//! Owns the loop of the meta group's leader, a node's answer to its orders, and what operators ask. What
//! happens next is decided in `reshape`, where a shard is split by itself in `grow`.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::Reason;
use coracle_proto::shard_map::{NodeId, ShardId};
use coracle_proto::{peer, v1};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::ChangeError;
use coracle_raft::group::{Group, MergePlan, PrepareMerge, SplitPlan};
use coracle_raft::rules::Rules;
use coracle_storage::ReplicaId;
use peer::ReshapeStep;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::elastic::{conflict, encode, refused_for};
use super::grow::{self, Growing};
use super::reshape::{self, Entry, Next, Seen, SplitWork};
use super::{COMMAND_TIMEOUT, Cluster, PUBLISH_TIMEOUT, Target, done, refused};
use crate::records::Snapshot;

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
    growing: Growing,
    /// By operation: how often a group has refused it.
    refusals: BTreeMap<u64, u32>,
    /// By operation: how many orders were given, which finds another node where nobody leads.
    orders: BTreeMap<u64, usize>,
}

/// Why an order was not carried out.
struct NotDone {
    why: String,
    /// The group understood it, and will not.
    refused: bool,
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
        self.grow(&snapshot, &mut memory.growing).await;
        let reshapes =
            |known: &&v1::ClusterOperation| known.split.is_some() || known.merge.is_some();
        let ids: Vec<u64> =
            snapshot.operations.active().filter(reshapes).map(|known| known.id).collect();
        memory.refusals.retain(|id, _| ids.contains(id));
        memory.orders.retain(|id, _| ids.contains(id));
        let turns = ids.into_iter().map(|id| {
            let refusals = memory.refusals.get(&id).copied().unwrap_or(0);
            let orders = memory.orders.get(&id).copied().unwrap_or(0);
            async move { (id, self.turn(id, refusals, orders).await) }
        });
        for (id, (refusals, orders)) in futures_util::future::join_all(turns).await {
            memory.refusals.insert(id, refusals);
            memory.orders.insert(id, orders);
        }
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
            let destroy = peer::DestroyReplica { shard: leaving.shard, replica: leaving.replica };
            async move {
                let over = match is_silent {
                    true => gone,
                    false => self.tell_destroy(leaving.node, destroy).await.is_ok(),
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
        }
    }

    /// One operation's turn: as far as it goes. Returns how often it was refused, and ordered something.
    async fn turn(&self, id: u64, mut refusals: u32, mut orders: usize) -> (u32, usize) {
        let until = Instant::now() + TURN;
        while Instant::now() < until {
            let Ok(snapshot) = self.records.load().await else { break };
            let Some(operation) = snapshot.operations.active().find(|known| known.id == id) else {
                break;
            };
            let seen = self.seen(&snapshot, operation).await;
            let next = match refusals >= REFUSALS_MAX && !operation.cancelling {
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
                    refusals = 0;
                    if !self.enter(id, &entry).await {
                        break;
                    }
                }
                Next::Ask(order) => {
                    let leader = leader(&seen, order.shard);
                    let to = leader.or_else(|| self.whom(&snapshot, order.shard, orders));
                    orders += 1;
                    let Some(to) = to else { break };
                    let order = with_rules(*order, &snapshot);
                    tracing::info!(operation = id, step = ?order.step(), shard = order.shard, "an order");
                    if let Err(NotDone { why, refused }) = self.tell_reshape(to, order).await {
                        tracing::info!(operation = id, why, "an order was not heeded");
                        refusals += u32::from(refused);
                        self.say(id, &why).await;
                        break;
                    }
                }
            }
        }
        (refusals, orders)
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

    async fn enter(&self, id: u64, entry: &Entry) -> bool {
        let now_ms = self.records.now_ms();
        let mut entered = false;
        let changed = self.records.change_all(|snapshot| {
            entered = reshape::enter(snapshot, id, entry, now_ms);
            Ok(entered)
        });
        match changed.await {
            Ok(snapshot) if entered => {
                let own = self.map.update_from_proto(&snapshot.map);
                let arcs = matches!(entry, Entry::Split { .. } | Entry::Taken { .. });
                // Where arcs have changed routes of before are refused: who asks next is to find the new.
                if own.is_ok()
                    && (arcs || matches!(entry, Entry::Back { .. } | Entry::Ended { .. }))
                {
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

    /// What the replicas say that matter for the operation's step.
    async fn seen(&self, snapshot: &Snapshot, operation: &v1::ClusterOperation) -> Seen {
        let (known, now) = (self.knowledge.lock().clone(), Instant::now());
        let freezes = operation.merge.as_ref().is_some_and(|it| it.step() == v1::MergeStep::Freeze);
        let timeout = if freezes { FREEZE_PROBE_TIMEOUT } else { PUBLISH_TIMEOUT };
        let asked = reshape::asked(snapshot, operation).into_iter();
        let asked = asked.filter(|(_, replica)| !known.silent.contains_key(&replica.node));
        let ask = asked.map(|(shard, replica)| async move {
            let probe = peer::Probe { shard, replica: replica.id, node: false };
            let own = self.membership.identity().is_some_and(|(_, own)| own.0 == replica.node);
            let answer = match own {
                true => self.answer_probe(probe),
                false => {
                    let target = Target::Node(NodeId(replica.node));
                    self.commands.command(target, Kind::Probe(probe), timeout).await.ok()?
                }
            };
            let status = v1::GroupStatus::decode(answer.body).ok()?;
            (status.replica == replica.id).then_some((replica.id, status))
        });
        let replicas = futures_util::future::join_all(ask).await.into_iter().flatten().collect();
        let nodes = &snapshot.map.nodes;
        let lost = nodes.iter().filter(|node| known.lost(node, &snapshot.operations, now));
        Seen {
            replicas,
            silent: known.silent.keys().copied().collect(),
            lost: lost.map(|node| node.id).collect(),
            now_ms: self.records.now_ms(),
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
        let not_done = |why: String| NotDone { why, refused: false };
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
                return Err(NotDone { why: answer.error, refused: !answer.reason.is_empty() });
            }
            to = NodeId(answer.ask_node);
        }
        Err(not_done("nobody leads the group for long".to_owned()))
    }

    /// Does a step of a split or a merge, where this node leads the group.
    pub(super) async fn reshape_here(&self, asked: peer::Reshape) -> peer::CommandDone {
        let shard = ShardId(asked.shard);
        let Some(group) = self.host.group(shard) else {
            return refused(format!("shard {shard} has no replica on this node"));
        };
        if asked.step() == ReshapeStep::Points {
            return match points(&group, &asked).await {
                Ok(points) => {
                    let body = points.encode_to_vec().into();
                    peer::CommandDone { body, ..Default::default() }
                }
                Err(why) => refused(why),
            };
        }
        let ordered = match order(&asked) {
            Ok(ordered) => ordered,
            Err(why) => return refused(why),
        };
        match carry_out(&group, ordered).await {
            Ok(()) => {
                let body = self.replica_status(&group, false).encode_to_vec().into();
                peer::CommandDone { body, ..Default::default() }
            }
            Err(error) => {
                let ask_node = match &error {
                    ChangeError::NotLeader { leader } => leader.map_or(0, |node| node.0),
                    _ => 0,
                };
                let reason = match &error {
                    ChangeError::Refused(_) => Reason::Conflict.as_str().to_owned(),
                    _ => String::new(),
                };
                peer::CommandDone {
                    error: error.to_string(),
                    ask_node,
                    reason,
                    ..Default::default()
                }
            }
        }
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

    /// Splits what is large, or has much to do, by itself.
    async fn grow(&self, snapshot: &Snapshot, growing: &mut Growing) {
        let (known, now) = (self.knowledge.lock().clone(), Instant::now());
        let Some((shard, by)) = growing.next(snapshot, &known, now) else { return };
        let points = self.split_points(snapshot, shard.id).await;
        let at = points.and_then(|points| grow::position(&shard, &points, by));
        let begun = match at {
            Err(why) => Err(why),
            Ok(at) => {
                let work = SplitWork { shard: shard.id, at, by, automatic: true, undoes: 0 };
                let now_ms = self.records.now_ms();
                let begun = self.records.change_all(|snapshot| {
                    reshape::begin_split(snapshot, work, now_ms).map(|_| true)
                });
                begun.await.map(drop).map_err(|error| error.to_string())
            }
        };
        match begun {
            Ok(()) => tracing::info!(shard = shard.id, ?by, "a shard is split by itself"),
            Err(why) => {
                tracing::info!(shard = shard.id, ?by, why, "a shard is not split by itself");
                growing.refused(shard.id, why, now);
            }
        }
        self.knowledge.lock().unsplit = growing.reasons();
    }

    /// What an operator asks: a split.
    pub(super) async fn split_here(
        &self,
        request: Result<v1::SplitShardRequest, peer::CommandDone>,
    ) -> Result<Bytes, peer::CommandDone> {
        let request = request?;
        let snapshot = self.records.load().await.map_err(|error| done(Err(error), self))?;
        let shard = find(&snapshot, request.shard)?;
        let points = self.split_points(&snapshot, shard.id).await;
        let bytes = points.as_ref().map_or(0, |points| points.bytes);
        let by = match (request.at, request.by()) {
            (Some(_), _) => v1::SplitBy::Unspecified,
            (None, v1::SplitBy::Load) => v1::SplitBy::Load,
            (None, _) => v1::SplitBy::Size,
        };
        let at = match request.at {
            Some(at) => at,
            None => points
                .and_then(|points| grow::position(shard, &points, by))
                .map_err(|why| refused_for(Reason::Conflict, &why))?,
        };
        if !reshape::is_inside(shard, at) {
            let why = format!(
                "{at:016x} is not inside the arc of s{}, {:016x} up to {:016x}, behind its first position",
                shard.id, shard.start, shard.end
            );
            return Err(refused_for(Reason::InvalidArgument, &why));
        }
        let mut response = v1::SplitShardResponse {
            operation: None,
            at,
            start: shard.start,
            end: shard.end,
            bytes,
        };
        if request.validate_only {
            let free = reshape::check_free(&snapshot, &[shard.id]);
            free.map_err(|why| refused_for(Reason::Conflict, &why))?;
            return encode(&response);
        }
        let now_ms = self.records.now_ms();
        let work = SplitWork { shard: shard.id, at, by, ..SplitWork::default() };
        let begun = self.change_elastic(|snapshot| {
            reshape::begin_split(snapshot, work, now_ms).map_err(conflict)
        });
        response.operation = Some(begun.await?);
        encode(&response)
    }

    /// What an operator asks: a merge.
    pub(super) async fn merge_here(
        &self,
        request: Result<v1::MergeShardsRequest, peer::CommandDone>,
    ) -> Result<Bytes, peer::CommandDone> {
        let request = request?;
        let snapshot = self.records.load().await.map_err(|error| done(Err(error), self))?;
        let (left, right) = (find(&snapshot, request.left)?, find(&snapshot, request.right)?);
        let pair = (left.id, right.id);
        let checked = reshape::check_merge(&snapshot, pair);
        let checked = checked.map_err(|why| refused_for(Reason::InvalidArgument, &why));
        checked?;
        let copies = self.knowledge.lock().bytes.get(&right.id).copied().unwrap_or(0);
        let moves = reshape::apart(left, right).into_iter().map(|(from_node, to_node)| {
            let bytes = if to_node == 0 { 0 } else { copies };
            v1::PlannedMove { shard: right.id, from_node, to_node, bytes }
        });
        let mut response = v1::MergeShardsResponse {
            operation: None,
            moves: moves.collect(),
            start: left.start,
            end: right.end,
        };
        if request.validate_only {
            let free = reshape::check_free(&snapshot, &[left.id, right.id]);
            free.map_err(|why| refused_for(Reason::Conflict, &why))?;
            return encode(&response);
        }
        let now_ms = self.records.now_ms();
        let begun = self.change_elastic(|snapshot| {
            reshape::begin_merge(snapshot, pair, 0, now_ms).map_err(conflict)
        });
        response.operation = Some(begun.await?);
        encode(&response)
    }
}

fn find(snapshot: &Snapshot, id: u64) -> Result<&v1::Shard, peer::CommandDone> {
    let shard = snapshot.map.shards.iter().find(|shard| shard.id == id);
    shard.ok_or_else(|| refused_for(Reason::UnknownShard, &format!("there is no shard s{id}")))
}

/// Who leads a shard, by its own word; of several the one of the highest term.
fn leader(seen: &Seen, shard: u64) -> Option<NodeId> {
    let its = seen.replicas.values().filter(|it| it.shard == shard && it.role == "leader");
    let leader = its.max_by_key(|status| status.term)?;
    (leader.leader_node != 0).then_some(NodeId(leader.leader_node))
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

/// What a group is told.
enum Order {
    Split(SplitPlan),
    Prepare(PrepareMerge),
    Freeze { merge: u64, epoch: u64 },
    Thaw { merge: u64, epoch: u64 },
    Absorb(MergePlan),
    End { merge: u64, epoch: u64 },
}

fn order(asked: &peer::Reshape) -> Result<Order, String> {
    let (merge, epoch) = (asked.operation, asked.epoch);
    let pairs = asked.replicas.iter();
    let replicas = pairs.map(|pair| (ReplicaId(pair.replica), ReplicaId(pair.other))).collect();
    Ok(match asked.step() {
        ReshapeStep::Split => Order::Split(SplitPlan {
            epoch,
            at: asked.at,
            child: ShardId(asked.other),
            replicas,
            rules: rules(asked)?,
        }),
        ReshapeStep::Prepare => Order::Prepare(PrepareMerge {
            merge,
            epoch,
            other: ShardId(asked.other),
            absorbs: asked.absorbs,
            rules: rules(asked)?,
        }),
        ReshapeStep::Freeze => Order::Freeze { merge, epoch },
        ReshapeStep::Thaw => Order::Thaw { merge, epoch },
        ReshapeStep::End => Order::End { merge, epoch },
        ReshapeStep::Absorb => {
            let other = v1::Shard::decode(asked.descriptor.clone());
            let other = other.map_err(|error| format!("not a shard: {error}"))?;
            let arc = Some((other.start, other.end));
            Order::Absorb(MergePlan {
                merge,
                epoch,
                other: Descriptor { shard: other.id, arc, epoch: other.epoch },
                frozen_at: asked.frozen_at,
                replicas,
                rules: rules(asked)?,
            })
        }
        ReshapeStep::Unspecified | ReshapeStep::Points => {
            return Err("an order of no kind, or of one that this version does not know".to_owned());
        }
    })
}

fn rules(asked: &peer::Reshape) -> Result<Rules, String> {
    let mut keyspaces = BTreeMap::new();
    for bytes in &asked.keyspaces {
        let keyspace = v1::Keyspace::decode(bytes.clone());
        let keyspace = keyspace.map_err(|error| format!("not a keyspace: {error}"))?;
        let keyspace = coracle_proto::shard_map::Keyspace::from_proto(&keyspace);
        let keyspace = keyspace.map_err(|error| error.to_string())?;
        if keyspace.id != coracle_proto::shard_map::SYSTEM_KEYSPACE {
            keyspaces.insert(keyspace.id.0, keyspace.rule);
        }
    }
    Ok(Rules { hash_seed: asked.hash_seed, keyspaces })
}

async fn carry_out(group: &Group, order: Order) -> Result<(), ChangeError> {
    // Its end comes before that of whoever waits for the answer.
    let deadline = Instant::now() + COMMAND_TIMEOUT * 3 / 4;
    match order {
        Order::Split(plan) => group.split(plan, deadline).await.map(drop),
        Order::Prepare(plan) => group.prepare_merge(plan, deadline).await.map(drop),
        Order::Freeze { merge, epoch } => {
            let soon = Instant::now() + Duration::from_millis(reshape::FREEZE_MAX_MS);
            group.freeze(merge, epoch, soon).await.map(drop)
        }
        Order::Thaw { merge, epoch } => group.thaw(merge, epoch, deadline).await.map(drop),
        Order::Absorb(plan) => group.absorb(plan, deadline).await.map(drop),
        Order::End { merge, epoch } => group.end_merge(merge, epoch, deadline).await.map(drop),
    }
}

async fn points(group: &Group, asked: &peer::Reshape) -> Result<peer::SplitPoints, String> {
    if !group.leads() {
        return Err("it is led elsewhere".to_owned());
    }
    let points = group.split_points(rules(asked)?).await.map_err(|error| error.to_string())?;
    let load = points.load.iter().map(|bucket| peer::LoadBucket {
        start: bucket.start,
        reads: bucket.reads,
        writes: bucket.writes,
    });
    Ok(peer::SplitPoints { by_size: points.by_size, bytes: points.bytes, load: load.collect() })
}
