//! How a replica's core comes to run: openraft over the replica's log and state.
//!
//! Owns openraft's settings, and that a start waits for nobody. What is applied on the way is the state
//! machine's business.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::{Error, ReplicaId};
use openraft::{Config, SnapshotPolicy};
use tokio_util::sync::CancellationToken;

use crate::descriptor::Descriptor;
use crate::environment::Environment;
use crate::leadership::Raft;
use crate::lease::Timing;
use crate::log_store::LogStore;
use crate::network::Networks;
use crate::state_machine::{self, SharedState, Starting, StateMachine};
use crate::types::ShardId;

/// What a group is started with.
pub(crate) struct Start {
    pub(crate) shard: ShardId,
    pub(crate) replica: ReplicaId,
    pub(crate) live: PathBuf,
    pub(crate) state: SharedState,
    pub(crate) initial: Descriptor,
    /// True when the replica was there before this process.
    pub(crate) restarted: bool,
}

/// Starts openraft over the replica's log and state. What is known to be committed is applied before this
/// returns, unless something of it waits for another group of this node: then that, and what follows, is
/// applied once a leader says again that it is committed, and the node serves its other groups meanwhile.
pub(super) async fn start_core(
    start: &Start,
    environment: &Environment,
    networks: Networks,
    config: Config,
    stop: &CancellationToken,
) -> Result<Raft, Error> {
    let mut log = LogStore::new(environment.log.clone(), start.replica, environment.exec.clone());
    let config = Arc::new(config);
    loop {
        let starting = Arc::new(Starting::default());
        let machine = StateMachine::new(state_machine::Parts {
            shared: start.state.clone(),
            exec: environment.exec.clone(),
            engines: environment.engines.clone(),
            live: start.live.clone(),
            starting: starting.clone(),
            observer: environment.observer.clone(),
            replica: start.replica,
            births: environment.births.clone(),
            stop: stop.clone(),
        });
        let id = start.replica.0;
        match Raft::new(id, config.clone(), networks.clone(), log.clone(), machine).await {
            Ok(raft) => {
                starting.end();
                return Ok(raft);
            }
            // Once: nothing is applied on the second way.
            Err(_) if starting.has_put_off() => log = log.forgetting_what_is_committed(),
            Err(fatal) => return Err(Error::invalid(format!("group {}: {fatal}", start.shard))),
        }
    }
}

pub(super) fn config(timing: &Timing, may_elect: bool) -> Config {
    let ms = |duration: Duration| duration.as_millis() as u64;
    Config {
        heartbeat_interval: ms(timing.heartbeat),
        election_timeout_min: ms(timing.election_min),
        election_timeout_max: ms(timing.election_max),
        enable_elect: may_elect,
        enable_pre_vote: Some(true),
        // A leader cut off from its followers' answers must not keep a healthy quorum waiting.
        quorum_loss_probe_interval: Some(ms(timing.election_max) * 2),
        max_payload_entries: 512,
        // Bounds openraft's own queues; bytes are bounded by the proposer and the transport.
        api_channel_size: Some(4_096),
        notification_channel_size: Some(4_096),
        state_machine_channel_size: Some(256),
        // When to flush and what to purge is the host's decision, by bytes.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        purge_batch_size: 1_024,
        // A leader that restarts into its own term could give one log id to two entries.
        enable_leader_restore: Some(false),
        allow_log_reversion: None,
        ..Config::default()
    }
}
