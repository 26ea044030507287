//! Decides what follows a failed attempt at one operation: give up, or try again, when, and what is
//! then known of a write. Pure: does not wait and does not send.

use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason, Retry};

/// Attempts at one operation: with the pauses between them about 1.5 s, longer than a failover takes
/// (its slowest percent: 1 s). Beyond: the last fault goes back, the client's own retries follow.
const ATTEMPTS_MAX: u32 = 12;
/// The pause after the first attempt that taught nothing.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// The story of one operation so far.
pub(crate) struct Attempts {
    write: bool,
    /// Whether the write's id was made here, so that no send of it is unknown here.
    own_id: bool,
    /// Whether this node may look further than at itself.
    retries: bool,
    /// Whether the caller named the route: then a stale one is for the caller to mend.
    route_named: bool,
    made: u32,
    /// Pauses so far.
    pauses: u32,
    /// Some earlier send of the write may still be applied.
    unresolved: bool,
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Next {
    /// Tell the caller.
    Fail(Fault),
    /// Try again after a pause, or as soon as the map changes.
    Again { pause: Duration },
}

impl Attempts {
    pub(crate) fn new(write: bool, own_id: bool, retries: bool, route_named: bool) -> Attempts {
        Attempts { write, own_id, retries, route_named, made: 0, pauses: 0, unresolved: false }
    }

    /// How many failed.
    pub(crate) fn made(&self) -> u32 {
        self.made
    }

    /// Takes a failed attempt in. `learned`: it named a leader that was not known before, so that
    /// the next attempt goes somewhere else at once.
    pub(crate) fn failed(&mut self, fault: Fault, learned: bool, left: Duration) -> Next {
        self.made += 1;
        // A passed window leaves open only what was open before: this send was refused.
        let open = fault.outcome == Outcome::Unknown && fault.reason != Reason::RetryWindowPassed;
        self.unresolved |= self.write && open;
        if !self.retries || !self.worth_another(&fault) || self.made >= ATTEMPTS_MAX {
            return Next::Fail(self.settled(fault));
        }
        let pause = if learned { Duration::ZERO } else { self.pause() };
        if pause >= left {
            return Next::Fail(self.settled(fault));
        }
        Next::Again { pause }
    }

    fn worth_another(&self, fault: &Fault) -> bool {
        match fault.reason {
            Reason::StaleRoute => !self.route_named,
            // Of the leader's own memory: its caller backs off, and so spares the leader.
            Reason::Overloaded | Reason::WriteStalled | Reason::ClockOutOfBound => false,
            _ => matches!(
                fault.reason.retry(),
                Retry::Redirect | Retry::BackOff | Retry::SameRequestId
            ),
        }
    }

    fn pause(&mut self) -> Duration {
        let pause = PAUSE_MIN.saturating_mul(1 << self.pauses.min(10)).min(PAUSE_MAX);
        self.pauses += 1;
        pause
    }

    /// The fault with what is known of the write: a later refusal says nothing of an earlier send.
    fn settled(&self, fault: Fault) -> Fault {
        if fault.reason == Reason::RetryWindowPassed && self.own_id && !self.unresolved {
            return fault.with_outcome(Outcome::NotApplied);
        }
        if !self.unresolved || fault.outcome != Outcome::NotApplied {
            return fault;
        }
        let message = format!("an earlier attempt may have been applied; the last one: {fault}");
        let mut unknown = Fault::new(Reason::OutcomeUnknown, message);
        unknown.metadata = fault.metadata;
        unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn fault(reason: Reason) -> Fault {
        Fault::new(reason, "test")
    }

    #[test]
    fn new_leader_is_followed_at_once_and_silence_backs_off() {
        let mut attempts = Attempts::new(true, false, true, false);
        let mut pauses = Vec::new();
        for learned in [true, false, false, true, false] {
            match attempts.failed(fault(Reason::NotLeader), learned, LONG) {
                Next::Again { pause } => pauses.push(pause.as_millis()),
                Next::Fail(fault) => panic!("{fault}"),
            }
        }
        assert_eq!(pauses, [0, 10, 20, 0, 40]);
    }

    #[test]
    fn attempts_end_within_a_bound() {
        let mut attempts = Attempts::new(false, false, true, false);
        let mut total = Duration::ZERO;
        while let Next::Again { pause } = attempts.failed(fault(Reason::NoQuorum), false, LONG) {
            total += pause;
        }
        assert_eq!(attempts.made(), ATTEMPTS_MAX);
        assert!((Duration::from_secs(1)..Duration::from_secs(2)).contains(&total), "{total:?}");
    }

    #[test]
    fn later_refusal_does_not_hide_an_unresolved_send() {
        let mut attempts = Attempts::new(true, false, true, false);
        let lost = attempts.failed(fault(Reason::Unreachable), false, LONG);
        assert!(matches!(lost, Next::Again { .. }));
        for refusal in [Reason::Overloaded, Reason::DeadlineNotApplied, Reason::InvalidArgument] {
            let Next::Fail(told) = attempts.failed(fault(refusal), false, LONG) else {
                panic!("{refusal} is final")
            };
            assert_eq!((told.reason, told.outcome), (Reason::OutcomeUnknown, Outcome::Unknown));
        }
        let Next::Fail(told) = attempts.failed(fault(Reason::RetryWindowPassed), false, LONG)
        else {
            panic!("final")
        };
        assert_eq!((told.reason, told.outcome), (Reason::RetryWindowPassed, Outcome::Unknown));
    }

    #[test]
    fn refusal_of_the_only_send_is_not_applied() {
        let mut attempts = Attempts::new(true, false, true, false);
        let redirected = attempts.failed(fault(Reason::NotLeader), false, LONG);
        assert!(matches!(redirected, Next::Again { .. }));
        let Next::Fail(told) = attempts.failed(fault(Reason::Overloaded), false, LONG) else {
            panic!("final")
        };
        assert_eq!((told.reason, told.outcome), (Reason::Overloaded, Outcome::NotApplied));
    }

    #[test]
    fn passed_window_is_not_applied_only_where_every_send_is_known() {
        let passed = |own_id, lost: bool| {
            let mut attempts = Attempts::new(true, own_id, true, false);
            if lost {
                let lost = attempts.failed(fault(Reason::Unreachable), false, LONG);
                assert!(matches!(lost, Next::Again { .. }));
            }
            match attempts.failed(fault(Reason::RetryWindowPassed), false, LONG) {
                Next::Fail(told) => told.outcome,
                Next::Again { .. } => panic!("final"),
            }
        };
        assert_eq!(passed(true, false), Outcome::NotApplied);
        assert_eq!(passed(true, true), Outcome::Unknown);
        assert_eq!(passed(false, false), Outcome::Unknown, "the client may have sent it before");
    }

    #[test]
    fn stale_route_is_mended_here_only_when_the_caller_named_none() {
        let failed = |route_named| {
            let mut attempts = Attempts::new(true, false, true, route_named);
            attempts.failed(fault(Reason::StaleRoute), false, LONG)
        };
        assert!(matches!(failed(true), Next::Fail(_)));
        assert!(matches!(failed(false), Next::Again { .. }));
    }

    #[test]
    fn forwarded_request_and_passed_deadline_are_never_tried_again() {
        let once =
            Attempts::new(true, false, false, false).failed(fault(Reason::NotLeader), true, LONG);
        assert!(matches!(once, Next::Fail(fault) if fault.reason == Reason::NotLeader));
        let mut late = Attempts::new(true, false, true, false);
        let late = late.failed(fault(Reason::Unreachable), false, Duration::ZERO);
        assert!(matches!(late, Next::Fail(fault) if fault.outcome == Outcome::Unknown));
    }
}
