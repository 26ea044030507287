//! Owns what a test tells a fake cluster to do wrong: delays, refusals, lost requests and answers,
//! each for the requests that come next. Does not serve and does not break connections itself.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::{Fault, Reason, metadata};
use tokio::sync::Notify;

use super::address;
use crate::topology::NodeId;

/// What a node does with one request, in place of just serving it. See
/// [`FakeCluster::script`](super::FakeCluster::script).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Act {
    /// Serves it, as if nothing had been said.
    Serve,
    /// Serves it after this long.
    Delay(Duration),
    /// Serves it when told to.
    Hold(Hold),
    /// Refuses it.
    Refuse(Refusal),
    /// Neither carries it out nor answers.
    LoseRequest,
    /// Carries it out, and never answers.
    LoseAnswer,
    /// Breaks all its connections instead.
    Cut,
    /// Carries it out, then breaks all its connections.
    ApplyAndCut,
    /// Of a scan or a delete-range in steps: breaks all its connections after this many pages, or
    /// answers that tell the progress.
    CutAfterPages(usize),
    /// Of the same: refuses to go on after so many.
    RefuseAfterPages(usize, Refusal),
}

/// Keeps one request waiting until the test lets it go. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Hold(Arc<Notify>);

impl Hold {
    /// A new one.
    pub fn new() -> Hold {
        Hold::default()
    }

    /// Lets the request go on: the one that waits, or the next that comes to it.
    pub fn release(&self) {
        self.0.notify_one();
    }

    pub(super) async fn released(&self) {
        self.0.notified().await;
    }
}

/// An error as a server answers it.
#[derive(Clone, Debug)]
pub struct Refusal(pub(super) Fault);

impl Refusal {
    /// By a name of the service's closed list of reasons, like `DISK_FULL`.
    ///
    /// # Panics
    /// When the list has no such name.
    pub fn new(reason: &str) -> Refusal {
        let known = Reason::parse(reason);
        let reason = known.unwrap_or_else(|| panic!("there is no reason {reason:?}"));
        Refusal(Fault::new(reason, "the test said so"))
    }

    /// The node does not lead the shard; `hint` is whom it names as the leader.
    pub fn not_leader(hint: Option<NodeId>) -> Refusal {
        let refusal = Refusal::new(Reason::NotLeader.as_str());
        match hint {
            Some(node) => {
                refusal.fact(metadata::LEADER_NODE, node).fact(metadata::LEADER_ADDR, address(node))
            }
            None => refusal,
        }
    }

    /// The node is overloaded, and asks to come back after this long.
    pub fn overloaded(retry_after: Duration) -> Refusal {
        Refusal(Refusal::new(Reason::Overloaded.as_str()).0.with_retry_after(retry_after))
    }

    /// Adds a fact, by its name in the error's metadata.
    #[must_use]
    pub fn fact(self, name: &str, value: impl ToString) -> Refusal {
        Refusal(self.0.with(name, value))
    }
}

/// What is to go wrong.
#[derive(Default)]
pub(super) struct Faults {
    scripts: BTreeMap<NodeId, VecDeque<Act>>,
    pub(super) answers_to_lose: u64,
    pub(super) requests_to_lose: u64,
    /// How many requests are refused, and with what.
    pub(super) refusals: Option<(u64, Refusal)>,
    pub(super) delay: Duration,
    pub(super) node_delays: BTreeMap<NodeId, Duration>,
    /// Each nth request of all is delayed by this much.
    pub(super) nth_delay: Option<(u64, Duration)>,
    calls: u64,
}

impl Faults {
    pub(super) fn script(&mut self, node: NodeId, acts: impl IntoIterator<Item = Act>) {
        self.scripts.entry(node).or_default().extend(acts);
    }

    /// What the script of a node says of its next request.
    pub(super) fn scripted(&mut self, node: NodeId) -> Option<Act> {
        self.scripts.get_mut(&node)?.pop_front()
    }

    /// What becomes of a request that has just come, and what is waited before.
    pub(super) fn next(&mut self, node: NodeId, is_write: bool) -> (Duration, Act) {
        self.calls += 1;
        let nth = self.nth_delay.filter(|(every, _)| self.calls.is_multiple_of(*every));
        let nth = nth.map_or(Duration::ZERO, |(_, delay)| delay);
        let own = self.node_delays.get(&node).copied().unwrap_or_default();
        let delay = self.delay + own + nth;
        if let Some(act) = self.scripted(node) {
            return (delay, act);
        }
        if take_one(&mut self.requests_to_lose) {
            return (delay, Act::LoseRequest);
        }
        if let Some((left, refusal)) = &mut self.refusals
            && take_one(left)
        {
            return (delay, Act::Refuse(refusal.clone()));
        }
        if is_write && take_one(&mut self.answers_to_lose) {
            return (delay, Act::LoseAnswer);
        }
        (delay, Act::Serve)
    }
}

fn take_one(left: &mut u64) -> bool {
    let taken = *left > 0;
    *left = left.saturating_sub(1);
    taken
}
