//! How replicas come to shards and go: the setting of read replicas and the moves of operations, made
//! true step by step.
//!
//! Owns the work of the meta group's leader: it records what shall be, then does one step after the
//! other (`step`), each first in the records or idempotent where it is done, so that whoever leads
//! the meta group next goes on from what it finds. Groups know best who belongs to them: the map
//! copies their epochs and, once a change is whole, who votes.
//!
//! A read replica is *recorded* as joining, under a fresh id; *made* on its node; *taken in* by its
//! group; and when it holds nearly all that the leader holds, *settled*: from then on it is read
//! from. One that goes is taken out of the map first, where the record `leaving` remembers it; then
//! its group lets it go, its node removes it, and the record forgets it.
//!
//! A voter comes as a read replica does, and when it has caught up its group lets it vote, in the place
//! of the one that it replaces, in one change; a change that a lost leader left half done is ended
//! before anything else. The one that went is then what any replica is that leaves.
//!
//! One whose node answers and cannot make it, or of which nothing moves, is given up after a while
//! (`patience`), and another place is tried. One that its node has lost, to damage, goes the same way,
//! and comes anew under a fresh id.
//!
//! From a change of a group's members until the map has the group's epoch, routes of before are refused
//! to writes: so a group's turn ends with the change, the epoch is recorded at once, and no shard waits
//! for another one's nodes to hear of it. Reads of keys go by the arc alone.

mod patience;
mod enter;
mod step;
mod setting;
mod hold;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::shard_map::{NodeId, ShardId};
use coracle_proto::{peer, v1};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use peer::MemberChange;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::enter::{Change, Outlook, enter, enter_plan, is_tended, is_voter};
use self::patience::Patience;
use self::step::{Home, Membership, Recorded, Seen, Step, next};
use super::knowledge::{Knowledge, SILENT};
use super::members::is_lost_role;
use super::{COMMAND_TIMEOUT, Cluster, PUBLISH_TIMEOUT, Target, create_command};
use super::{balance, operations};
use crate::records::{Operations, RecordsError, Snapshot};

/// Between two looks at what is to be done.
const TEND_INTERVAL: Duration = Duration::from_millis(200);
/// Between two looks at what is to be begun: each may make a plan of the whole cluster.
const ACT_INTERVAL: Duration = Duration::from_secs(1);
/// Shards that are worked on at a time: each takes a question to its leader.
const SHARDS_AT_ONCE: usize = 16;
/// Every shard is looked at this often though nothing is to be done: a change may have come late.
const AUDIT_INTERVAL: Duration = Duration::from_secs(10);
/// A replica that is joining is given up when its node is silent for so long: another node may do.
const GRACE: Duration = Duration::from_secs(60);
/// A replica has caught up when it lacks nothing older than this...
const CAUGHT_UP_LAG: Duration = Duration::from_millis(500);
/// ...and no more than this, because a leader that has just been elected knows no ages.
const CAUGHT_UP_ENTRIES: u64 = 1_000;

/// What a controller remembers, only as long as it leads the meta group.
#[derive(Default)]
struct Tending {
    /// Replicas that their nodes say they have made.
    made: BTreeSet<u64>,
    /// By shard: who leads it, as somebody said.
    leaders: BTreeMap<u64, NodeId>,
    /// By shard: when it was last worked on.
    worked: BTreeMap<u64, Instant>,
    /// By node: since when it was not heard here.
    unheard: BTreeMap<u64, Instant>,
    /// By node: since when it is silent, by what all have heard.
    silent: BTreeMap<u64, Instant>,
    /// By shard: how often it was asked in vain, and nobody named its leader.
    failed: BTreeMap<u64, usize>,
    patience: Patience,
    /// When the records were last looked at for what is to be begun.
    acted: Option<Instant>,
}

/// One shard's turn.
struct Job {
    shard: v1::Shard,
    leaving: Vec<peer::LeavingReplica>,
    ask: NodeId,
    made: BTreeSet<u64>,
    homes: BTreeMap<u64, Home>,
    silent: BTreeSet<u64>,
    /// Replicas that have been joining for too long.
    stuck: BTreeSet<u64>,
}

/// What came of it.
#[derive(Default)]
struct Outcome {
    shard: u64,
    made: Vec<u64>,
    /// Replicas that their nodes refused to make.
    refused: Vec<u64>,
    /// Up to where replicas hold their log.
    held: Vec<(u64, u64)>,
    /// Nodes on which a replica of the shard was given up, and whether it had been there.
    gave_up: Vec<(u64, bool)>,
    leader: Option<NodeId>,
    changes: Vec<Change>,
}

impl Cluster {
    /// Has replicas and leaders come and go, where this node leads the meta group.
    pub async fn tend_replicas(&self, stop: CancellationToken) {
        let (survey, spread) = (self.survey(&stop), self.spread_leaders(&stop));
        let (tend, reshape) = (self.tend_all(&stop), self.reshape_all(&stop));
        // Each at its own pace: a node that hangs, or an election, holds up nothing else.
        futures_util::future::join4(tend, survey, spread, reshape).await;
    }

    async fn tend_all(&self, stop: &CancellationToken) {
        let mut tending = Tending::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(TEND_INTERVAL) => {}
            }
            if !self.leads_meta() {
                tending = Tending::default();
                *self.knowledge.lock() = Knowledge::default();
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.tend(&mut tending) => {}
            }
        }
    }

    async fn tend(&self, tending: &mut Tending) {
        let Ok(snapshot) = self.records.load().await else {
            return;
        };
        self.knowledge.lock().note(&snapshot.operations);
        self.note_silence(&snapshot.map, tending);
        let joining = snapshot.map.shards.iter().flat_map(|shard| &shard.replicas);
        let joining = joining.filter(|replica| replica.joining).map(|replica| replica.id);
        tending.patience.follow(Instant::now(), &joining.collect());
        let snapshot = match self.record_plan(snapshot, tending).await {
            Ok(snapshot) => snapshot,
            Err(error) => {
                tracing::info!(%error, "read replicas could not be planned");
                return;
            }
        };
        let jobs = self.jobs(&snapshot, tending);
        let mut working: FuturesUnordered<_> =
            jobs.into_iter().map(|job| self.work_on(job)).collect();
        let mut telling = FuturesUnordered::new();
        loop {
            let mut changes = tokio::select! {
                biased;
                Some(outcome) = working.next(), if !working.is_empty() => tending.learn(outcome),
                Some(()) = telling.next(), if !telling.is_empty() => continue,
                else => return,
            };
            // What others have come to by now goes into the same record.
            while let Some(Some(outcome)) = working.next().now_or_never() {
                changes.extend(tending.learn(outcome));
            }
            if let Some(map) = self.record(&changes).await {
                self.hold_at_changes(&changes).await;
                // A node that hangs holds up no other shard's record.
                telling.push(async move { self.publish(&map).await });
            }
        }
    }

    fn note_silence(&self, map: &v1::ShardMap, tending: &mut Tending) {
        for node in &map.nodes {
            match self.commands.silence(NodeId(node.id)).is_some_and(|silence| silence < SILENT) {
                true => drop(tending.unheard.remove(&node.id)),
                false => drop(tending.unheard.entry(node.id).or_insert_with(Instant::now)),
            }
        }
        tending.unheard.retain(|node, _| map.nodes.iter().any(|known| known.id == *node));
        let mut known = self.knowledge.lock();
        tending.silent = known.silent_since(map, &tending.unheard);
        known.silent.clone_from(&tending.silent);
        let nodes: Vec<u64> = map.nodes.iter().map(|node| node.id).collect();
        if known.nodes.as_ref().is_none_or(|(before, _)| *before != nodes) {
            known.nodes = Some((nodes, Instant::now()));
        }
        known.follow(map);
        // Their leaders are learnt anew.
        for shard in std::mem::take(&mut known.handed_over) {
            tending.worked.remove(&shard);
            tending.leaders.remove(&shard);
        }
        let leaders = self.map.current();
        let leaders = leaders.iter().flat_map(|map| map.all_shards());
        let leaders = leaders.filter_map(|shard| Some((shard.id.0, shard.leader?.0)));
        known.leaders = leaders.collect();
        // Those that answered as leaders: hints come only of what this node holds or passes on.
        known.leaders.extend(tending.leaders.iter().map(|(shard, node)| (*shard, node.0)));
        let avoided = tending.patience.avoided(Instant::now());
        (known.avoided_nodes, known.avoided_places) = (avoided.nodes, avoided.places);
    }

    /// Records which replicas shall come and go. Returns the records as they are then.
    async fn record_plan(
        &self,
        snapshot: Snapshot,
        tending: &mut Tending,
    ) -> Result<Snapshot, RecordsError> {
        let outlook = tending.outlook();
        let known = self.knowledge.lock().clone();
        let (now, now_ms) = (Instant::now(), self.records.now_ms());
        let acts = tending.acted.is_none_or(|at| now.duration_since(at) >= ACT_INTERVAL);
        if acts {
            tending.acted = Some(now);
        }
        let grace = self.holding.patience(GRACE);
        let silent = tending.silent.iter().filter(|(_, since)| now - **since >= grace);
        let given_up: BTreeSet<u64> = silent.map(|(node, _)| *node).collect();
        let enter = |snapshot: &mut Snapshot| {
            let learners = enter_plan(snapshot, &outlook);
            let begun = acts && balance::act(snapshot, &known, now, now_ms);
            operations::advance(snapshot, &given_up, now_ms) | begun | learners
        };
        let mut snapshot = snapshot;
        if !enter(&mut snapshot) {
            return Ok(snapshot);
        }
        let mut before = Operations::default();
        let entered = self.records.change_all(|snapshot| {
            before.clone_from(&snapshot.operations);
            Ok(enter(snapshot))
        });
        let entered = entered.await?;
        self.hold_at_operations(&before, &entered.operations).await;
        self.publish(&entered.map).await;
        Ok(entered)
    }

    /// The shards whose turn it is, the longest unseen first.
    fn jobs(&self, snapshot: &Snapshot, tending: &mut Tending) -> Vec<Job> {
        let now = Instant::now();
        let has_work = |shard: &v1::Shard| {
            shard.replicas.iter().any(|replica| replica.joining || replica.goes)
                || snapshot.leaving.iter().any(|leaving| leaving.shard == shard.id)
        };
        let audit_due = |shard: &v1::Shard| {
            let worked = tending.worked.get(&shard.id);
            worked.is_none_or(|at| now.duration_since(*at) >= AUDIT_INTERVAL)
        };
        // What is split or merged changes arcs, epochs and members by itself.
        let shards = snapshot
            .map
            .shards
            .iter()
            .filter(|shard| is_tended(shard) && !snapshot.operations.is_reshaped(shard.id));
        let mut due: Vec<&v1::Shard> =
            shards.filter(|shard| has_work(shard) || audit_due(shard)).collect();
        due.sort_by_key(|shard| tending.worked.get(&shard.id).copied());
        due.truncate(SHARDS_AT_ONCE);
        let grace = self.holding.patience(GRACE);
        let homes: BTreeMap<u64, Home> =
            snapshot.map.nodes.iter().map(|node| (node.id, tending.home(node, grace))).collect();
        let silent: BTreeSet<u64> = tending.silent.keys().copied().collect();
        let stuck = tending.patience.stuck(now);
        let mut jobs = Vec::new();
        for shard in due {
            let leaving = snapshot.leaving.iter().filter(|leaving| leaving.shard == shard.id);
            tending.worked.insert(shard.id, now);
            jobs.push(Job {
                ask: self.whom_to_ask(shard, tending),
                leaving: leaving.copied().collect(),
                made: tending.made.clone(),
                homes: homes.clone(),
                silent: silent.clone(),
                stuck: stuck.clone(),
                shard: shard.clone(),
            });
        }
        jobs
    }

    /// Who was named leads, as a rule; when that came to nothing, any voter tells who does.
    fn whom_to_ask(&self, shard: &v1::Shard, tending: &Tending) -> NodeId {
        let failed = tending.failed.get(&shard.id).copied().unwrap_or(0);
        let told = tending.leaders.get(&shard.id).copied();
        let hint = || self.map.current()?.shard(ShardId(shard.id))?.leader;
        let voters = shard.replicas.iter().filter(|replica| is_voter(replica));
        let voters: Vec<NodeId> = voters.map(|replica| NodeId(replica.node)).collect();
        let any = voters[failed % voters.len()];
        told.or_else(|| hint().filter(|_| failed == 0)).unwrap_or(any)
    }

    /// Looks at a shard's group and does what comes next to each of its read replicas.
    async fn work_on(&self, job: Job) -> Outcome {
        let shard = &job.shard;
        let mut outcome = Outcome { shard: shard.id, ..Outcome::default() };
        let look = peer::ChangeMembers { shard: shard.id, ..Default::default() };
        let mut group = match self.ask_leader(job.ask, look).await {
            Ok(group) => group,
            Err((why, leader)) => {
                tracing::debug!(shard = shard.id, node = job.ask.0, why, "a group was not asked");
                outcome.leader = leader;
                given_up(&job, &mut outcome);
                return outcome;
            }
        };
        outcome.leader = Some(job.ask);
        if group.joint {
            match self.finish_held(job.ask, shard.id).await {
                Ok(told) => group = told,
                Err((why, leader)) => {
                    tracing::info!(shard = shard.id, why, "a change of voters is half done still");
                    outcome.leader = leader;
                    return outcome;
                }
            }
        }
        if let Some(change) = voters_changed(shard, &group) {
            outcome.changes.push(change);
            return outcome;
        }
        for (replica, node, recorded) in concerned(&job, &group) {
            let member = group.members.iter().find(|member| member.replica == replica);
            outcome.held.extend(member.map(|member| (replica, member.matched_index)));
            let is = member.map_or(Membership::Absent, membership);
            let lost = match member {
                Some(member) => self.is_lost(&job, recorded, member).await,
                None => false,
            };
            let step = job.next(replica, node, recorded, is, lost);
            if step != Step::Wait {
                tracing::info!(shard = shard.id, replica, node, lost, ?step, "a replica");
            }
            if step == Step::Withdraw && (lost || job.stuck.contains(&replica)) {
                outcome.gave_up.push((node, lost));
            }
            let taken = self.take_held(step, &job, (replica, node), &mut group, &mut outcome).await;
            if let Err(why) = &taken {
                tracing::info!(shard = shard.id, replica, node, ?step, why, "not done yet");
            }
            match step {
                // The map is to have the group's new epoch before anything else is done.
                Step::Add | Step::Remove | Step::Promote | Step::Retire => break,
                // Its own node's affair: it holds up no other replica.
                Step::Make if taken.is_err() => outcome.refused.push(replica),
                _ => {}
            }
        }
        if group.epoch > shard.epoch {
            outcome.changes.push(Change::Epoch { shard: shard.id, epoch: group.epoch });
        }
        outcome
    }

    async fn take(
        &self,
        step: Step,
        job: &Job,
        (replica, node): (u64, u64),
        group: &mut v1::GroupStatus,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let shard = job.shard.id;
        let changed = |change| peer::ChangeMembers {
            shard,
            epoch: group.epoch,
            change: i32::from(change),
            replica,
            node,
            remove: 0,
        };
        match step {
            Step::Wait => {}
            Step::Make | Step::Destroy if job.silent.contains(&node) => {}
            Step::Make => {
                let made = v1::Replica { id: replica, node, ..Default::default() };
                // The epoch of a description that its own log will overtake.
                self.tell_create(node, create_command(&job.shard, &made, false)).await?;
                outcome.made.push(replica);
            }
            Step::Add | Step::Remove => {
                let change = match step {
                    Step::Add => MemberChange::AddLearner,
                    _ => MemberChange::RemoveLearner,
                };
                let told = self.ask_leader(job.ask, changed(change)).await;
                *group = told.map_err(|(why, leader)| {
                    outcome.leader = leader;
                    why
                })?;
            }
            Step::Promote | Step::Retire => {
                let (comes, goes) = match step {
                    Step::Promote => (replica, job.replaced_by(replica)),
                    _ => (0, replica),
                };
                if group.epoch != job.shard.epoch {
                    // It was decided upon other members: the map hears of these first.
                    return Ok(());
                }
                let voters = group.members.iter().filter(|m| m.role() == v1::ReplicaRole::Voter);
                let is_alone = voters.count() == 1 && comes != 0;
                if goes == group.replica && !is_alone {
                    // It leads: another shall, and then it goes.
                    let hand_over = peer::HandOver { shard, to_node: 0 };
                    return self.tell_hand_over(job.ask, hand_over).await;
                }
                // An only voter goes when the other votes.
                let goes = if is_alone { 0 } else { goes };
                let change = MemberChange::Voters;
                let asked = peer::ChangeMembers { replica: comes, remove: goes, ..changed(change) };
                *group = self.ask_leader(job.ask, asked).await.map_err(|(why, leader)| {
                    outcome.leader = leader;
                    why
                })?;
                outcome.changes.extend(voters_changed(&job.shard, group));
            }
            Step::Settle => outcome.changes.push(Change::Settle { shard, replica }),
            Step::Withdraw => {
                let stray = job.is_stray(replica);
                outcome.changes.push(Change::Withdraw { shard, replica, node, stray });
            }
            Step::Destroy => {
                self.tell_destroy(node, peer::DestroyReplica { shard, replica }).await?;
                outcome.changes.push(Change::Forget { replica });
            }
            Step::Forget => outcome.changes.push(Change::Forget { replica }),
        }
        Ok(())
    }

    /// Whether a replica that its leader has not heard for long is lost: its node answers, and says that
    /// it does not run there.
    async fn is_lost(&self, job: &Job, recorded: Recorded, member: &v1::MemberStatus) -> bool {
        let expected = matches!(recorded, Recorded::Joining | Recorded::Present);
        let unheard = u128::from(member.heard_ms) >= SILENT.as_millis();
        if !expected || !unheard || job.silent.contains(&member.node) {
            return false;
        }
        let (id, node) = (member.replica, member.node);
        let replica = v1::Replica { id, node, ..Default::default() };
        let told = self.probe(job.shard.id, replica, PUBLISH_TIMEOUT).await;
        told.is_some_and(|told| is_lost_role(&told.role))
    }

    /// Asks whoever leads a group. The error names who leads instead, where that is known.
    async fn ask_leader(
        &self,
        node: NodeId,
        asked: peer::ChangeMembers,
    ) -> Result<v1::GroupStatus, (String, Option<NodeId>)> {
        let own = self.membership.identity().is_some_and(|(_, own)| own == node);
        let answer = match own {
            true => Ok(self.change_members(asked).await),
            false => {
                let kind = Kind::ChangeMembers(asked);
                self.commands.command(Target::Node(node), kind, COMMAND_TIMEOUT).await
            }
        };
        let told = answer.map_err(|why| (why, None))?;
        if !told.error.is_empty() {
            let instead = (told.ask_node != 0).then_some(NodeId(told.ask_node));
            return Err((told.error, instead));
        }
        v1::GroupStatus::decode(told.body).map_err(|error| (error.to_string(), None))
    }

    /// Records changes. Returns the map that is to be told, if there were any.
    async fn record(&self, changes: &[Change]) -> Option<v1::ShardMap> {
        if changes.is_empty() {
            return None;
        }
        let recorded = self.records.change_all(|snapshot| {
            let mut changed = false;
            for change in changes {
                changed |= enter(snapshot, change);
            }
            Ok(changed)
        });
        match recorded.await {
            Ok(snapshot) => Some(snapshot.map),
            Err(error) => {
                tracing::info!(%error, "replicas could not be recorded");
                None
            }
        }
    }
}

impl Job {
    fn next(
        &self,
        replica: u64,
        node: u64,
        recorded: Recorded,
        member: Membership,
        lost: bool,
    ) -> Step {
        let home = self.homes.get(&node).copied().unwrap_or(Home::Gone);
        let (made, stuck) = (self.made.contains(&replica), self.stuck.contains(&replica));
        let becomes_voter = self.becomes_voter(replica);
        next(Seen { recorded, member, home, made, lost, stuck, becomes_voter })
    }

    /// The voter whose place a replica shall take; 0 means none.
    fn replaced_by(&self, replica: u64) -> u64 {
        let replica = self.shard.replicas.iter().find(|known| known.id == replica);
        replica.map_or(0, |replica| replica.replaces)
    }

    fn becomes_voter(&self, replica: u64) -> bool {
        self.shard.replicas.iter().any(|known| known.id == replica && known.becomes_voter)
    }

    fn is_stray(&self, replica: u64) -> bool {
        !self.shard.replicas.iter().any(|known| known.id == replica)
    }
}

impl Tending {
    /// Remembers what came of a shard's turn. Returns what is to be recorded.
    fn learn(&mut self, outcome: Outcome) -> Vec<Change> {
        let (now, shard) = (Instant::now(), outcome.shard);
        outcome.made.iter().for_each(|replica| self.patience.asked(now, *replica, false));
        outcome.refused.iter().for_each(|replica| self.patience.asked(now, *replica, true));
        for (replica, matched) in outcome.held {
            self.patience.holds(now, replica, matched);
        }
        for (node, lost) in outcome.gave_up {
            self.patience.gave_up(now, shard, node, lost);
        }
        self.made.extend(outcome.made);
        match outcome.leader {
            Some(leader) => {
                self.leaders.insert(shard, leader);
                self.failed.remove(&shard);
            }
            None => {
                self.leaders.remove(&shard);
                *self.failed.entry(shard).or_default() += 1;
            }
        }
        outcome.changes
    }

    fn outlook(&self) -> Outlook {
        let now = Instant::now();
        Outlook {
            silent: self.silent.clone(),
            avoided: self.patience.avoided(now),
            stalled: self.patience.stalled(now),
        }
    }

    fn home(&self, node: &v1::Node, grace: Duration) -> Home {
        match (node.state(), self.silent.get(&node.id)) {
            // One that answers can remove what it holds.
            (v1::NodeState::Gone | v1::NodeState::Decommissioned, Some(_)) => Home::Gone,
            (_, Some(since)) if since.elapsed() >= grace => Home::Silent,
            _ => Home::Hoped,
        }
    }
}

/// What can be done though a group cannot be asked: nobody waits for a node that does not come back.
fn given_up(job: &Job, outcome: &mut Outcome) {
    for (replica, node, recorded) in concerned(job, &v1::GroupStatus::default()) {
        if job.next(replica, node, recorded, Membership::NotAsked, false) == Step::Withdraw {
            let (shard, stray) = (job.shard.id, false);
            outcome.changes.push(Change::Withdraw { shard, replica, node, stray });
            if job.stuck.contains(&replica) {
                outcome.gave_up.push((node, false));
            }
        }
    }
}

/// The replicas of a shard of which something may have to be done: those that leave first, because one
/// that comes may want their place.
fn concerned(job: &Job, group: &v1::GroupStatus) -> Vec<(u64, u64, Recorded)> {
    let leaving =
        job.leaving.iter().map(|leaving| (leaving.replica, leaving.node, Recorded::Leaving));
    let known = job.shard.replicas.iter().filter(|replica| !is_voter(replica) || replica.goes);
    let known = known.map(|replica| {
        let recorded = match (replica.joining, replica.goes) {
            (true, _) => Recorded::Joining,
            (false, true) => Recorded::Going,
            (false, false) => Recorded::Present,
        };
        (replica.id, replica.node, recorded)
    });
    let known: Vec<_> = leaving.chain(known).collect();
    let strays = group.members.iter().filter(|member| {
        member.role() == v1::ReplicaRole::Learner
            && known.iter().all(|(replica, _, _)| *replica != member.replica)
    });
    let strays = strays.map(|member| (member.replica, member.node, Recorded::Unknown));
    let strays: Vec<_> = strays.collect();
    known.into_iter().chain(strays).collect()
}

/// What the map has to learn of who votes, from what a majority of the group has confirmed.
fn voters_changed(shard: &v1::Shard, group: &v1::GroupStatus) -> Option<Change> {
    if group.joint || group.epoch < shard.epoch {
        return None;
    }
    let voters = group.members.iter().filter(|member| member.role() == v1::ReplicaRole::Voter);
    let voters: BTreeSet<(u64, u64)> = voters.map(|voter| (voter.replica, voter.node)).collect();
    let known = shard.replicas.iter().filter(|replica| is_voter(replica));
    let known: BTreeSet<(u64, u64)> = known.map(|replica| (replica.id, replica.node)).collect();
    let voters_differ = !voters.is_empty() && voters != known;
    voters_differ.then(|| Change::Voters {
        shard: shard.id,
        epoch: group.epoch,
        voters: voters.into_iter().collect(),
    })
}

fn membership(member: &v1::MemberStatus) -> Membership {
    if member.role() == v1::ReplicaRole::Voter {
        return Membership::Voter;
    }
    let near = member.lag_entries <= CAUGHT_UP_ENTRIES
        && u128::from(member.lag_ms) <= CAUGHT_UP_LAG.as_millis();
    // Of one that was not heard yet nothing is known.
    Membership::Learner { caught_up: member.matched_index > 0 && near }
}
