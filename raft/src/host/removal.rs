//! How a replica leaves its node: stopped, closed, out of the log, off the disk, in this order.
//!
//! Owns that this is done once at a time for one replica, and holds up no other. Does not know why a
//! replica goes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use coracle_storage::{Error, ReplicaId};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Host, Key, ended, told};
use crate::snapshot::blocking;
use crate::state_machine::store_dir;
use crate::types::ShardId;

type Answer = oneshot::Sender<Result<(), Arc<Error>>>;

/// The destructions under way, and who waits for each.
#[derive(Default)]
pub(super) struct Destroying(Mutex<BTreeMap<ReplicaId, Vec<Answer>>>);

impl Destroying {
    /// Joins a destruction. True for the first one, which carries it out.
    fn join(&self, replica: ReplicaId, answer: Answer) -> bool {
        let mut destroying = self.0.lock();
        let first = !destroying.contains_key(&replica);
        let waiting = destroying.entry(replica).or_default();
        // Bounded by who still waits.
        waiting.retain(|answer| !answer.is_closed());
        waiting.push(answer);
        first
    }

    fn end(&self, replica: ReplicaId) -> Vec<Answer> {
        self.0.lock().remove(&replica).unwrap_or_default()
    }
}

/// Ends a destruction, once, also where its task is torn down: nobody waits for it in vain.
struct Ending {
    host: Arc<Host>,
    replica: ReplicaId,
    result: Option<Result<(), Arc<Error>>>,
}

impl Ending {
    fn tell(mut self, result: Result<(), Error>) {
        self.result = Some(result.map_err(Arc::new));
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        for answer in self.host.destroying.end(self.replica) {
            // Without a result the drop of the answer tells.
            if let Some(result) = &self.result {
                let _ = answer.send(result.clone());
            }
        }
    }
}

impl Host {
    /// Stops a replica and removes all of it, whether it runs or not. Its id is remembered, also
    /// where it was never made: it never comes back. Done already is no error. Goes on when the
    /// caller gives up waiting; whoever asks again meanwhile waits for the same.
    pub async fn destroy(
        self: &Arc<Self>,
        shard: ShardId,
        replica: ReplicaId,
    ) -> Result<(), Error> {
        let (answer, destroyed) = oneshot::channel();
        if self.destroying.join(replica, answer) {
            let ending = Ending { host: self.clone(), replica, result: None };
            let destroy = async move {
                let result = ending.host.destroy_whole(shard, replica).await;
                ending.tell(result);
            };
            self.environment.exec.spawn("destroy", Box::pin(destroy));
        }
        let destroyed =
            destroyed.await.map_err(|_| Error::invalid("the node is stopping".to_owned()))?;
        destroyed.map_err(|error| Error::invalid(error.to_string()))
    }

    async fn destroy_whole(&self, shard: ShardId, replica: ReplicaId) -> Result<(), Error> {
        let _shard = self.turns.take(Key::Shard(shard)).await;
        let _replica = self.turns.take(Key::Replica(replica)).await;
        let running = self.groups().into_iter().find(|group| group.replica() == replica);
        if let Some(group) = running {
            let its = group.shard();
            if its != shard {
                let why = format!("replica {} is one of {its}, not of {shard}", replica.0);
                return Err(Error::invalid(why));
            }
            self.groups.write().remove(&shard);
            group.shutdown().await;
            group.close().await?;
        }
        let log = &self.environment.log;
        if !log.was_destroyed(replica)? {
            if matches!(log.state(replica), Err(Error::UnknownReplica(_))) {
                // Never made. A late question to make it must find that it is gone.
                let (done, created) = oneshot::channel();
                log.create(replica, told(done));
                ended(created.await)?;
            }
            let (done, destroyed) = oneshot::channel();
            log.destroy(replica, told(done));
            ended(destroyed.await)?;
        }
        self.failed.lock().retain(|(failed, _)| *failed != replica);
        // A crash before this: the next start knows from the log that it goes.
        self.remove_dir(store_dir(&self.shards, replica.0)).await
    }

    async fn remove_dir(&self, dir: PathBuf) -> Result<(), Error> {
        let engines = self.environment.engines.clone();
        let removed = blocking(&*self.environment.exec, move || engines.destroy(&dir)).await;
        removed.map_err(Error::invalid)?
    }
}
