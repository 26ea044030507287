//! Owns serving a plan by a group of this node: the gate, the group, the answer. Does not choose the
//! group, and does not try again.

use coracle_proto::limits;
use coracle_proto::reason::Fault;
use coracle_proto::shard_map::{KeyspaceId, ShardId, ShardMap};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_raft::apply::Reply;
use coracle_raft::clock::HybridTime;
use coracle_raft::command::{self, Change};
use coracle_raft::group::Group;
use coracle_raft::history::Pin;
use coracle_raft::types::Position;
use tokio::time::Instant;

use crate::admission::Call;
use crate::fault::Refusal;
use crate::metrics::{ReadServed, Stage};
use crate::router::page::PageSpec;
use crate::router::plan::{Freshness, Lookup, Plan, Task};
use crate::router::steps::{Step, Steps};
use crate::router::whom::leader_in;
use crate::router::{Router, answer, page, pin, range, read};

impl Router {
    /// Serves a plan by a group of this node.
    pub(super) async fn serve(
        &self,
        map: &ShardMap,
        group: &Group,
        plan: Plan,
        call: &Call,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        let (began, deadline) = (Instant::now(), call.deadline);
        let told = |refusal: Refusal| self.refused(map, plan.shard, group, refusal);
        match plan.task {
            Task::Get(lookup) => {
                let found = self.look_up(group, plan.shard, plan.keyspace, &lookup, deadline);
                let (mut entries, served) = found.await.map_err(told)?;
                self.parts.loads.count(plan.shard, 1, 0);
                steps.add(Step::Read, began.elapsed());
                let (entry, served) = (entries.pop().flatten(), Some(served));
                Ok(Answer::Get(v1::GetResponse { entry, served }))
            }
            Task::BatchGet(lookup) => {
                let found = self.look_up(group, plan.shard, plan.keyspace, &lookup, deadline);
                let (entries, served) = found.await.map_err(told)?;
                self.parts.loads.count(plan.shard, entries.len() as u64, 0);
                steps.add(Step::Read, began.elapsed());
                let item = |entry| v1::BatchGetItem { entry, served: Some(served) };
                let items = entries.into_iter().map(item).collect();
                Ok(Answer::BatchGet(v1::BatchGetResponse { items }))
            }
            Task::Write { request, answer } => {
                self.parts.gate.check(plan.shard, only_deletes(&request))?;
                let reply = self.write(group, plan.shard, request, deadline, steps);
                let reply = reply.await.map_err(told)?;
                let served = self.served(plan.shard, Position::default(), true);
                answer::written(reply, answer, served, map)
            }
            _ => Box::pin(self.serve_rarer(map, group, plan, call, steps)).await,
        }
    }

    /// The same for what is asked for less often. A future of its own, which is boxed: see
    /// [`Router::execute`].
    async fn serve_rarer(
        &self,
        map: &ShardMap,
        group: &Group,
        plan: Plan,
        call: &Call,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        let (began, deadline) = (Instant::now(), call.deadline);
        let told = |refusal: Refusal| self.refused(map, plan.shard, group, refusal);
        match plan.task {
            Task::Get(_) | Task::BatchGet(_) | Task::Write { .. } => {
                unreachable!("they are served by the caller")
            }
            Task::DeleteRange(spec) => {
                self.parts.gate.check(plan.shard, true)?;
                let next = range::step(group, &spec, plan.epoch, deadline).await.map_err(told)?;
                steps.add(Step::Read, began.elapsed());
                let reply = match next {
                    range::Step::Decided(reply) => reply,
                    range::Step::Propose(request) => {
                        let reply = self.write(group, plan.shard, request, deadline, steps);
                        reply.await.map_err(told)?
                    }
                };
                let served = self.served(plan.shard, Position::default(), true);
                answer::range_deleted(reply, &spec, served, map)
            }
            Task::Page(spec) => {
                let page = page::read_page(group, &spec, plan.epoch, plan.position, deadline).await;
                let (page, at) = page.map_err(told)?;
                self.parts.loads.count(plan.shard, PageSpec::keys(&page), 0);
                self.stages.observe(Stage::Read, began.elapsed());
                steps.add(Step::Read, began.elapsed());
                Ok(Answer::Scan(spec.response(page, self.served(plan.shard, at, group.leads()))))
            }
            Task::Fix { version } => {
                let fixed = page::fix_version(group, version, plan.epoch, deadline).await;
                let (fixed, at) = fixed.map_err(told)?;
                let served = Some(self.served(plan.shard, at, group.leads()));
                Ok(Answer::FixVersion(v1::FixVersionResponse { served, ..fixed }))
            }
            Task::Pin { version, until_ms } => {
                let pin = Pin { keyspace: plan.keyspace.0, version, until_ms };
                let until_ms = pin::pin_version(group, pin, plan.epoch, deadline).await;
                let until_ms = until_ms.map_err(told)?;
                let served = Some(self.served(plan.shard, Position::default(), true));
                Ok(Answer::PinVersion(v1::PinVersionResponse { until_ms, served }))
            }
        }
    }

    /// Writes through a group of this node.
    async fn write(
        &self,
        group: &Group,
        shard: ShardId,
        request: command::Request,
        deadline: Instant,
        steps: &mut Steps,
    ) -> Result<Reply, Refusal> {
        self.parts.loads.count(shard, 0, request.operations.len() as u64);
        let written = group.write(request, deadline).await?;
        steps.add(Step::Queue, written.queued);
        steps.add(Step::Replicate, written.replicated);
        Ok(written.reply)
    }

    /// Reads keys by a group of this node.
    async fn look_up(
        &self,
        group: &Group,
        shard: ShardId,
        keyspace: KeyspaceId,
        lookup: &Lookup,
        deadline: Instant,
    ) -> Result<(Vec<Option<v1::Entry>>, v1::Served), Refusal> {
        let (began, now_ms) = (Instant::now(), self.now_ms());
        // A clock that strays judges no expiry: the group's own is behind at worst.
        let judged_ms = self.parts.clock.check().map_or(0, |()| now_ms);
        let found = read::look_up(group, keyspace.0, lookup, judged_ms, deadline).await?;
        group.count_reads(lookup.keys.iter().map(|(position, _)| *position));
        self.stages.observe(Stage::Read, began.elapsed());
        let mut served = self.served(shard, found.at, group.leads());
        served.judged_at = found.judged_at;
        served.staleness_ms = match found.age {
            Some(age) => u64::try_from(age.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX),
            None => {
                match lookup.freshness {
                    Freshness::Any => self.reads.count(ReadServed::Any, 1),
                    _ => self.reads.count(ReadServed::Session, 1),
                }
                // Of what was acknowledged after the group clock, this replica may know nothing.
                let age_ms = now_ms.saturating_sub(HybridTime(found.clock).ms());
                age_ms + limits::CLOCK_BOUND.as_millis() as u64
            }
        };
        let entries = found.entries.into_iter().map(|found| found.map(answer::entry));
        Ok((entries.collect(), served))
    }

    /// What a group of this node refused, with the leader that it knows.
    fn refused(&self, map: &ShardMap, shard: ShardId, group: &Group, refusal: Refusal) -> Fault {
        let leader = leader_in(&group.status()).filter(|leader| leader.node != self.parts.node);
        refusal.fault(Some(map), shard, leader)
    }

    fn served(&self, shard: ShardId, at: Position, leader: bool) -> v1::Served {
        v1::Served {
            shard: shard.0,
            term: at.term,
            index: at.index,
            node: self.parts.node.0,
            leader,
            staleness_ms: 0,
            server_time_ms: self.now_ms(),
            judged_at: 0,
        }
    }
}

fn only_deletes(request: &command::Request) -> bool {
    let deletes = |change: &Change| matches!(change, Change::Delete | Change::Check);
    request.operations.iter().all(|operation| deletes(&operation.change))
}
