//! Owns the decision what to do after a failed attempt: a pure function of what is known of the
//! call so far. Time and randomness come in as values. Does not wait, send or count (see `driver`).

use std::time::Duration;

use coracle_proto::reason::Reason;

use crate::topology::NodeId;

/// Redirects that are followed at once, in a row. A leader is found in one or two; more means that
/// the nodes disagree, as they do during an election, and asking faster does not end that.
pub(crate) const REDIRECTS_MAX: u32 = 5;

/// Longest first wait. About one round trip inside a zone plus a commit.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);

/// Longest wait. An election takes about as long; waiting calls are woken when a new leader becomes
/// known, so this only bounds the load of those who find nobody.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Below this no attempt can come back in time.
const ATTEMPT_MIN: Duration = Duration::from_millis(1);

/// How an attempt failed, as far as it matters for the next one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Failure {
    /// The node does not lead the shard. `leader` is whom it believes to lead, if that node can be
    /// tried: its address is known and it is not one that just failed to answer.
    NotLeader { leader: Option<NodeId> },
    /// The route was older than the node's: the shard has been split, merged or moved.
    StaleRoute,
    /// Nobody can serve this now, or the node cannot be reached, or the connection broke.
    Unavailable,
    /// One of several replicas that may serve this read cannot: the others are not concerned.
    OnlyHere,
    /// The node can serve this, only not so much at once.
    Overloaded,
    /// The answer did not come in time.
    TimedOut,
    /// Another node became the shard's leader while the request was under way.
    LeaderChanged,
    /// The leader's clock does not fit its peers', or the request's birth does not fit the clock.
    ClockOutOfBound,
    /// The request id is older than what the shard remembers.
    WindowPassed,
    /// Asking again gives the same.
    Fatal,
}

impl Failure {
    /// What a node's refusal means; `leader` is the leader that it names, if that can be tried.
    pub(crate) fn of(reason: Reason, leader: Option<NodeId>) -> Failure {
        match reason {
            Reason::NotLeader | Reason::Draining | Reason::TooStale => {
                Failure::NotLeader { leader }
            }
            Reason::StaleRoute => Failure::StaleRoute,
            Reason::NoQuorum | Reason::OutcomeUnknown | Reason::Unreachable => Failure::Unavailable,
            // Who has a map knows that the cluster has been made: the node has yet to hear of it.
            Reason::NotInitialized => Failure::Unavailable,
            Reason::Overloaded | Reason::WriteStalled => Failure::Overloaded,
            Reason::ClockOutOfBound => Failure::ClockOutOfBound,
            // It was the attempt's deadline, not yet the call's.
            Reason::DeadlineNotApplied => Failure::TimedOut,
            Reason::RetryWindowPassed => Failure::WindowPassed,
            Reason::InvalidArgument
            | Reason::TooLarge
            | Reason::CrossEntity
            | Reason::UnknownKeyspace
            | Reason::KeyspaceExists
            | Reason::UnknownShard
            | Reason::UnknownNode
            | Reason::VersionGone
            | Reason::Conflict
            | Reason::NotAllowed
            | Reason::Unsupported
            | Reason::AlreadyInitialized
            | Reason::DiskFull
            | Reason::Corruption
            | Reason::Internal => Failure::Fatal,
        }
    }
}

/// What is known of the call when an attempt has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttemptInfo {
    /// How the attempt failed.
    pub(crate) failure: Failure,
    /// Waits that this call has made.
    pub(crate) backoffs: u32,
    /// Redirects and refreshes that were followed at once, since the last wait.
    pub(crate) detours: u32,
    /// This is a write, and an attempt of it, this one or an earlier, may have been applied.
    pub(crate) unresolved: bool,
    /// The retry budget has a token.
    pub(crate) budget: bool,
    /// The server's wish: wait at least this long.
    pub(crate) retry_after: Option<Duration>,
    /// Until the call's deadline.
    pub(crate) remaining: Duration,
    /// Uniform in `[0, 1)`.
    pub(crate) jitter: f64,
}

/// Where the next attempt goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Decision {
    /// To the same node.
    SameNode,
    /// To another replica of the shard.
    OtherReplica,
    /// Wherever a newer map says.
    RefreshRoute,
    /// To this node.
    Redirect(NodeId),
    /// Anywhere, under a fresh request id: the old one was surely not applied, and never will be.
    FreshRequestId,
    /// Nowhere: the call ends with what is known.
    Stop,
}

/// The decision, and what it costs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Step {
    /// Where to.
    pub(crate) decision: Decision,
    /// How long to wait before; zero for at once.
    pub(crate) wait: Duration,
    /// Whether it is paid from the retry budget.
    pub(crate) paid: bool,
}

impl Step {
    const STOP: Step = Step { decision: Decision::Stop, wait: Duration::ZERO, paid: false };

    fn at_once(decision: Decision) -> Step {
        Step { decision, wait: Duration::ZERO, paid: false }
    }
}

/// Decides the next step of a call.
///
/// - Never goes on past the deadline.
/// - The budget is spent only on what makes an overload worse. It ends a call only when no attempt
///   may have been applied: an unresolved write goes on until somebody knows its outcome.
/// - Under `WindowPassed` the shard has forgotten what it may have known, so the outcome of an
///   unresolved write can no longer be learned; any other write was not applied and may start anew.
pub(crate) fn decide(info: &AttemptInfo) -> Step {
    if info.remaining < ATTEMPT_MIN {
        return Step::STOP;
    }
    match info.failure {
        Failure::Fatal => Step::STOP,
        Failure::WindowPassed if info.unresolved => Step::STOP,
        Failure::WindowPassed => detour(info, Decision::FreshRequestId),
        Failure::NotLeader { leader: Some(node) } => detour(info, Decision::Redirect(node)),
        Failure::NotLeader { leader: None } => back_off(info, Decision::OtherReplica),
        Failure::StaleRoute => detour(info, Decision::RefreshRoute),
        Failure::Unavailable => back_off(info, Decision::OtherReplica),
        Failure::OnlyHere => detour(info, Decision::OtherReplica),
        // A newer birth mends the one cause, time or another leader the other.
        Failure::ClockOutOfBound if info.unresolved => back_off(info, Decision::SameNode),
        Failure::ClockOutOfBound => back_off(info, Decision::FreshRequestId),
        Failure::LeaderChanged => detour(info, Decision::OtherReplica),
        Failure::Overloaded => paid(info, back_off(info, Decision::SameNode)),
        // The whole attempt timeout has already been waited.
        Failure::TimedOut => paid(info, Step::at_once(Decision::OtherReplica)),
    }
}

/// At once while there are few in a row, then with a wait.
fn detour(info: &AttemptInfo, decision: Decision) -> Step {
    if info.retry_after.is_none() && info.detours < REDIRECTS_MAX {
        return Step::at_once(decision);
    }
    match decision {
        // Whoever sent us around in circles knows no better a moment later; another might.
        Decision::Redirect(_) => back_off(info, Decision::OtherReplica),
        other => back_off(info, other),
    }
}

/// After a wait with full jitter, at least as long as the server asks.
fn back_off(info: &AttemptInfo, decision: Decision) -> Step {
    let wished = info.retry_after.unwrap_or(Duration::ZERO);
    if wished >= info.remaining {
        return Step::STOP;
    }
    let ceiling = BACKOFF_FIRST.saturating_mul(1 << info.backoffs.min(16)).min(BACKOFF_MAX);
    // Half of what remains stays for the attempt itself.
    let jittered = ceiling.mul_f64(info.jitter).min(info.remaining / 2);
    Step { decision, wait: wished.max(jittered), paid: false }
}

fn paid(info: &AttemptInfo, step: Step) -> Step {
    if step.decision == Decision::Stop || info.budget || info.unresolved {
        return Step { paid: step.decision != Decision::Stop, ..step };
    }
    Step::STOP
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const NODE: NodeId = NodeId(3);

    fn info(failure: Failure) -> AttemptInfo {
        AttemptInfo {
            failure,
            backoffs: 0,
            detours: 0,
            unresolved: false,
            budget: true,
            retry_after: None,
            remaining: Duration::from_secs(5),
            jitter: 0.5,
        }
    }

    fn step(decision: Decision, wait: Duration, paid: bool) -> Step {
        Step { decision, wait, paid }
    }

    #[test]
    fn what_the_contract_calls_final_is_final() {
        use coracle_proto::reason::Retry;
        for reason in Reason::ALL {
            let failure = Failure::of(*reason, None);
            let is_final = matches!(failure, Failure::Fatal | Failure::WindowPassed);
            // Two that are final for a caller are not for a client that has time and a map.
            let passes = matches!(reason, Reason::DeadlineNotApplied | Reason::NotInitialized);
            assert_eq!(is_final, reason.retry() == Retry::Never && !passes, "{reason}");
        }
    }

    fn check(cases: impl IntoIterator<Item = (AttemptInfo, Step)>) {
        for (info, expected) in cases {
            assert_eq!(decide(&info), expected, "{info:?}");
        }
    }

    #[test]
    fn where_to_go() {
        let to_leader = info(Failure::NotLeader { leader: Some(NODE) });
        let nobody = info(Failure::NotLeader { leader: None });
        let stale = info(Failure::StaleRoute);
        let zero = Duration::ZERO;
        let redirect = step(Decision::Redirect(NODE), zero, false);
        let other = step(Decision::OtherReplica, 5 * MS, false);
        let refresh = |wait| step(Decision::RefreshRoute, wait, false);
        let in_a_row = |detours, info| AttemptInfo { detours, ..info };
        check([
            (to_leader, redirect),
            (in_a_row(4, to_leader), redirect),
            (in_a_row(5, to_leader), other),
            (nobody, other),
            (stale, refresh(zero)),
            (in_a_row(5, stale), refresh(5 * MS)),
            (info(Failure::Unavailable), other),
            (info(Failure::OnlyHere), step(Decision::OtherReplica, zero, false)),
            (in_a_row(5, info(Failure::OnlyHere)), other),
            (info(Failure::LeaderChanged), step(Decision::OtherReplica, zero, false)),
            (info(Failure::Overloaded), step(Decision::SameNode, 5 * MS, true)),
            (info(Failure::TimedOut), step(Decision::OtherReplica, zero, true)),
        ]);
    }

    #[test]
    fn a_request_id_is_only_replaced_when_nothing_is_open() {
        let fresh = |wait| step(Decision::FreshRequestId, wait, false);
        let open = |failure| AttemptInfo { unresolved: true, ..info(failure) };
        check([
            (info(Failure::WindowPassed), fresh(Duration::ZERO)),
            (open(Failure::WindowPassed), Step::STOP),
            (info(Failure::ClockOutOfBound), fresh(5 * MS)),
            (open(Failure::ClockOutOfBound), step(Decision::SameNode, 5 * MS, false)),
        ]);
    }

    #[test]
    fn what_is_final_is_final_for_open_writes_too() {
        check([
            (info(Failure::Fatal), Step::STOP),
            (AttemptInfo { unresolved: true, ..info(Failure::Fatal) }, Step::STOP),
        ]);
    }

    #[test]
    fn waits_double_up_to_a_second_with_full_jitter() {
        let wait = |backoffs, jitter| {
            let info = AttemptInfo { backoffs, jitter, ..info(Failure::Unavailable) };
            decide(&info).wait
        };
        assert_eq!(wait(0, 0.0), Duration::ZERO);
        assert_eq!(wait(1, 0.5), 10 * MS);
        assert_eq!(wait(4, 0.5), 80 * MS);
        assert_eq!(wait(7, 0.5), 500 * MS);
        assert_eq!(wait(30, 0.5), 500 * MS);
        assert_eq!(wait(u32::MAX, 0.5), 500 * MS);
    }

    #[test]
    fn the_servers_wish_is_honoured() {
        let wish = |retry_after, remaining| {
            let info = AttemptInfo {
                retry_after: Some(retry_after),
                remaining,
                ..info(Failure::Overloaded)
            };
            decide(&info)
        };
        assert_eq!(wish(300 * MS, 5_000 * MS), step(Decision::SameNode, 300 * MS, true));
        assert_eq!(wish(2 * MS, 5_000 * MS).wait, 5 * MS, "the longer of both");
        assert_eq!(wish(300 * MS, 300 * MS), Step::STOP, "never past the deadline");
    }

    #[test]
    fn never_past_the_deadline() {
        for failure in [Failure::Unavailable, Failure::TimedOut, Failure::StaleRoute] {
            for unresolved in [false, true] {
                let info = AttemptInfo { remaining: Duration::ZERO, unresolved, ..info(failure) };
                assert_eq!(decide(&info), Step::STOP);
            }
        }
        let late = AttemptInfo {
            remaining: 40 * MS,
            backoffs: 9,
            jitter: 0.99,
            ..info(Failure::Unavailable)
        };
        assert_eq!(decide(&late).wait, 20 * MS, "half of the rest stays for the attempt");
    }

    #[test]
    fn an_empty_budget_ends_only_what_cannot_have_been_applied() {
        for failure in [Failure::Overloaded, Failure::TimedOut] {
            let broke = AttemptInfo { budget: false, ..info(failure) };
            assert_eq!(decide(&broke), Step::STOP, "{failure:?}");
            let unresolved = AttemptInfo { unresolved: true, ..broke };
            assert_ne!(decide(&unresolved).decision, Decision::Stop, "{failure:?}");
        }
        // What does not load anybody is free.
        for failure in [
            Failure::Unavailable,
            Failure::OnlyHere,
            Failure::ClockOutOfBound,
            Failure::StaleRoute,
            Failure::LeaderChanged,
            Failure::NotLeader { leader: Some(NODE) },
            Failure::WindowPassed,
        ] {
            let broke = AttemptInfo { budget: false, ..info(failure) };
            assert_ne!(decide(&broke).decision, Decision::Stop, "{failure:?}");
            assert!(!decide(&broke).paid, "{failure:?}");
        }
    }
}
