//! What a group keeps of its past: settings taken over, versions pinned, and what nobody can read any
//! more reclaimed. Owns the calls; what they mean is `history`'s.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::apply::Outcome;
use crate::command::Command;
use crate::error::GroupError;
use crate::group::Group;
use crate::history::{Pin, Pinned, Settings};
use crate::leadership::Standing;

/// What a store took, in bytes, before and after everything in it was rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reclaimed {
    /// Before.
    pub before: u64,
    /// After.
    pub after: u64,
}

impl Group {
    /// The lowest version of a keyspace that may be read, as far as this replica has applied.
    pub fn threshold(&self, keyspace: u32) -> u64 {
        self.state.history().threshold(keyspace)
    }

    /// Of which revision a keyspace's settings are in this replica; 0: none.
    pub fn settings_revision(&self, keyspace: u32) -> u64 {
        self.state.history().revision(keyspace)
    }

    /// Hands settings to the group; of a keyspace that it has newer ones of, they change nothing. On
    /// the leader.
    pub async fn adopt(&self, settings: Vec<Settings>) -> Result<(), GroupError> {
        self.proposer.own(Command::Settings(settings)).await.map(drop)
    }

    /// Keeps a version of a keyspace readable for a time. On the leader. An unknown outcome may be
    /// asked for again: a pin is shared by all who want it.
    pub async fn pin(&self, pin: Pin) -> Result<Pinned, GroupError> {
        let replies = self.proposer.own(Command::Pin(pin)).await?;
        match replies.0.into_iter().next().map(|reply| reply.outcome) {
            Some(Outcome::Pinned(pinned)) => Ok(pinned),
            // Frozen: another group holds its keys soon, or it does again.
            Some(Outcome::StaleRoute { .. }) => Err(GroupError::TooStale),
            other => panic!("apply answers a pin with what became of it, not {other:?}"),
        }
    }

    /// Rewrites this replica's store without what nobody can read any more: superseded versions,
    /// deletes, expired values. Takes as long as reading and writing all of it does, and goes on when
    /// the caller gives up; a replica that is stopped, or replaced by a snapshot, ends it. Where this replica leads, the group clock moves first: an idle group's
    /// stands still, and nothing grows old by it.
    pub async fn reclaim(self: &Arc<Self>) -> Result<Reclaimed, GroupError> {
        if self.status().state == Standing::Leader {
            self.adopt(Vec::new()).await?;
        }
        let (answer, done) = oneshot::channel();
        let state = self.state.clone();
        self.environment.exec.blocking(Box::new(move || {
            let _ = answer.send(state.reclaim());
        }));
        let done = done.await.map_err(|_| GroupError::Stopped)?;
        let (before, after) = done.map_err(|error| match self.stop.is_cancelled() {
            true => GroupError::Stopped,
            false => GroupError::Storage(error.to_string()),
        })?;
        Ok(Reclaimed { before, after })
    }
}
