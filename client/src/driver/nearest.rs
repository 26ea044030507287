//! Owns one attempt at a read that any replica may serve: the nearest is asked, and a second one when
//! that takes long. The first answer counts, whoever gives it: what makes a session hold is the token
//! that both were sent. Does not decide who is near (see `near`) or what is long (see `hedge`).

use std::pin::pin;
use std::sync::Arc;

use coracle_proto::reason::Fault;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use tokio::time::{Instant, sleep_until};

use super::{Attempts, Setback};
use crate::hedge::Hedging;
use crate::pipeline::Pipeline;
use crate::retry::Failure;
use crate::route::Route;
use crate::stats::Counters;
use crate::topology::NodeId;

/// A replica that can be asked.
struct Asked {
    node: NodeId,
    pipeline: Arc<Pipeline>,
}

type Ended = Result<Answer, (Failure, Fault)>;

impl Attempts<'_> {
    /// Asks the nearest replica that has not been asked yet; `None` when there is none.
    pub(super) async fn attempt_nearest(
        &mut self,
        route: &Route,
    ) -> Option<Result<Answer, Setback>> {
        let (driver, shard) = (self.driver, route.shard);
        let follower = &driver.follower;
        let table = follower.routes.table();
        let usable =
            |node| table.address(node).is_some_and(|address| follower.pool.is_usable(address));
        let tried = self.tried.as_mut()?;
        let mut replicas = table.readable(shard, driver.settings.zone.as_deref());
        replicas.retain(|replica| !tried.contains(&replica.node) && usable(replica.node));
        let chance = follower.random();
        let order = driver.near.order(shard, &replicas, self.turn, chance, Instant::now());
        let mut asked = order.into_iter().filter_map(|node| {
            let pipeline = follower.pool.get(table.address(node)?)?;
            Some(Asked { node, pipeline })
        });
        let (first, second) = (asked.next()?, asked.next());
        tried.push(first.node);
        let counters = &driver.counters;
        if self.attempts == 0 {
            Counters::add(&counters.nearest);
        }
        self.attempts = self.attempts.saturating_add(1);
        let operation = self.operation(route);
        let (node, ended) = self.ask_hedged(first, second, operation).await;
        Some(match ended {
            Ok(Answer::Error(error)) => {
                let setback = self.judge(route, node, Fault::from_pipeline(&error));
                Err(self.elsewhere(route, node, setback))
            }
            Ok(answer) => {
                self.learn(&answer);
                Ok(answer)
            }
            Err((failure, fault)) => {
                let cut_short = failure == Failure::TimedOut && Instant::now() >= self.deadline;
                let setback = Setback { failure, fault, node: Some(node), cut_short };
                Err(self.elsewhere(route, node, setback))
            }
        })
    }

    /// What follows where a replica could not serve: another one at once, as long as there are some;
    /// behind one that is too stale the leader, which is not.
    fn elsewhere(&mut self, route: &Route, node: NodeId, setback: Setback) -> Setback {
        let failure = match setback.failure {
            Failure::Unavailable | Failure::NotLeader { leader: None } => Failure::OnlyHere,
            failure => failure,
        };
        if failure != Failure::Fatal {
            self.driver.near.failed(route.shard, node, Instant::now());
            Counters::add(&self.driver.counters.moved_on);
        }
        match failure {
            Failure::OnlyHere => {}
            // Another attempt at the same node, or at the leader.
            _ => self.tried = None,
        }
        Setback { failure, ..setback }
    }

    async fn ask_hedged(
        &self,
        first: Asked,
        second: Option<Asked>,
        operation: Operation,
    ) -> (NodeId, Ended) {
        let started = Instant::now();
        let hedging = match operation {
            Operation::BatchGet(_) => &self.driver.hedging[1],
            _ => &self.driver.hedging[0],
        };
        let delay = match self.driver.settings.hedge_reads {
            true => hedging.begin(),
            false => None,
        };
        let hedge = delay.zip(second);
        let mut one = pin!(self.ask_measured(&first, operation.clone(), hedging));
        let Some((delay, second)) = hedge else { return (first.node, one.await) };
        tokio::select! {
            biased;
            ended = &mut one => return (first.node, ended),
            () = sleep_until(started + delay) => {}
        }
        if !hedging.pay() {
            return (first.node, one.await);
        }
        let counters = &self.driver.counters;
        Counters::add(&counters.hedges);
        let mut two = pin!(self.ask_measured(&second, operation, hedging));
        let (ended, second_ended) = tokio::select! {
            biased;
            ended = &mut one => (ended, false),
            ended = &mut two => (ended, true),
        };
        if is_final(&ended) {
            if second_ended {
                // The first took at least so long: without this, what is slow would not be seen.
                Counters::add(&counters.hedges_won);
                let took = started.elapsed();
                hedging.measured(took);
                self.driver.near.measured(first.node, took, Instant::now());
            }
            return (if second_ended { second.node } else { first.node }, ended);
        }
        // Whoever failed has said nothing of the other.
        match second_ended {
            true => (first.node, one.await),
            false => (second.node, two.await),
        }
    }

    async fn ask_measured(&self, asked: &Asked, operation: Operation, hedging: &Hedging) -> Ended {
        let started = Instant::now();
        let is_get = matches!(operation, Operation::Get(_));
        let ended = self.exchange(None, asked.node, &asked.pipeline, operation).await;
        if ended.as_ref().is_ok_and(|answer| !matches!(answer, Answer::Error(_))) {
            let took = started.elapsed();
            hedging.measured(took);
            if is_get {
                self.driver.near.measured(asked.node, took, Instant::now());
            }
        }
        ended
    }
}

/// Whether nobody would answer anything else.
fn is_final(ended: &Ended) -> bool {
    match ended {
        Ok(Answer::Error(error)) => {
            let fault = Fault::from_pipeline(error);
            Failure::of(fault.reason, None) == Failure::Fatal
        }
        Ok(_) => true,
        Err(_) => false,
    }
}
