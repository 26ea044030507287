//! How time is used by a group, and what makes lease reads safe.
//!
//! Owns the settings that hang together, their check, and the embargo after a restart.
//!
//! A leader serves a read without asking anybody while a majority has answered it within its lease:
//! no follower that answered gives a vote before the lease has passed. Three things could break
//! that, and each has its guard here. A node that restarts has forgotten whom it answered: for one
//! lease it gives no vote and does not campaign (the *embargo*). Clocks that run at different rates
//! could make the leader's lease outlast the followers': reads use only three quarters of it. And
//! nodes with different settings: every node of a cluster must have the same, so they are compiled
//! in as one preset and overridden for all nodes alike.

use std::time::Duration;

use coracle_storage::Mutant;
use tokio::time::Instant;

/// The times of consensus. They relate to each other: see [`Timing::check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// A leader tells its followers that it lives.
    pub heartbeat: Duration,
    /// Shortest election timeout, counted after the lease.
    pub election_min: Duration,
    /// Longest election timeout; also the lease.
    pub election_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(250),
            election_max: Duration::from_millis(500),
        }
    }
}

impl Timing {
    /// For so long after a leader's last message no follower votes for another.
    pub fn lease(&self) -> Duration {
        self.election_max
    }

    /// The oldest quorum answer on which a leader serves a read without asking again.
    pub fn read_lease(&self) -> Duration {
        if Mutant::LeaseTooLong.is_in() {
            return self.lease() * 20;
        }
        self.lease() * 3 / 4
    }

    /// What contradicts what, as a sentence; `None` when the times go together.
    pub fn check(&self) -> Option<String> {
        if self.heartbeat < Duration::from_millis(10) {
            return Some("raft.heartbeat_interval is below 10ms".to_owned());
        }
        if self.lease() < self.heartbeat * 5 {
            return Some(format!(
                "raft.election_timeout_max ({:?}) is also the lease and must be at least 5 × raft.heartbeat_interval ({:?})",
                self.election_max, self.heartbeat
            ));
        }
        if self.election_min >= self.election_max {
            return Some(format!(
                "raft.election_timeout_min ({:?}) must be below raft.election_timeout_max ({:?})",
                self.election_min, self.election_max
            ));
        }
        None
    }
}

/// No votes given and no campaign before this moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Embargo(Option<Instant>);

impl Embargo {
    /// For a replica that was there before this process: it may have answered a leader just before.
    pub(crate) fn after_restart(timing: &Timing) -> Self {
        if Mutant::NoEmbargo.is_in() {
            return Self::none();
        }
        Self(Some(Instant::now() + timing.lease()))
    }

    /// For a replica created in this process's lifetime: it has answered nobody.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    pub(crate) fn holds(&self) -> bool {
        self.0.is_some_and(|end| Instant::now() < end)
    }

    pub(crate) fn end(&self) -> Option<Instant> {
        self.0
    }
}
