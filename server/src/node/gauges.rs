//! What is read off the node when somebody asks for its metrics, instead of being counted on the way.

use coracle_raft::leadership::Standing;
use coracle_storage::fs::Space;

use super::member::Member;
use crate::clock::PeerClocks;
use crate::metrics::Metrics;

/// Sets every gauge to what is so now.
pub(super) fn collect(
    metrics: &Metrics,
    member: &Member,
    clocks: &PeerClocks,
    space: Option<Space>,
) {
    let groups = member.host.groups();
    let (mut led, mut orphaned) = (0, 0);
    // Of groups that are led elsewhere by now nothing is left.
    metrics.replica_lag_entries.clear();
    metrics.replica_lag_seconds.clear();
    metrics.shard_reads_per_second.clear();
    metrics.shard_writes_per_second.clear();
    for group in &groups {
        let status = group.status();
        led += i64::from(status.state == Standing::Leader);
        orphaned += i64::from(status.leader.is_none());
        let shard = format!("s{}", group.shard());
        metrics.shard_size_bytes.with([shard.as_str()]).set(group.state_bytes() as i64);
        let rates = member.cluster.loads.rates(group.shard());
        metrics.shard_reads_per_second.with([shard.as_str()]).set(rates.reads as i64);
        metrics.shard_writes_per_second.with([shard.as_str()]).set(rates.writes as i64);
        for (replica, lag) in group.lags() {
            let Some(member) = status.members.get(&replica) else { continue };
            if replica == group.replica().0 {
                continue;
            }
            let peer = format!("n{}", member.node);
            let series = [shard.as_str(), peer.as_str()];
            metrics.replica_lag_entries.with(series).set(lag.entries as i64);
            metrics.replica_lag_seconds.with(series).set(lag.age.as_secs_f64());
        }
    }
    metrics.raft_groups.set(groups.len() as i64);
    metrics.raft_leaders.set(led);
    metrics.raft_groups_without_leader.set(orphaned);
    // Counted where it happens, and only brought here: what others took meanwhile is there next time.
    let sent = member.host.snapshot_bytes_sent();
    metrics.snapshot_sent_bytes.inc_by(sent.saturating_sub(metrics.snapshot_sent_bytes.get()));
    metrics.log_size_bytes.set(member.log.stats().bytes_on_disk as i64);
    let balancing = member.cluster.balancing_set();
    metrics.operations_active.set(balancing.active as i64);
    metrics.balancer_automatic.set(i64::from(balancing.automatic));
    metrics.balancer_split_bytes.set(i64::try_from(balancing.split_bytes).unwrap_or(i64::MAX));
    let load = i64::try_from(balancing.split_load).unwrap_or(i64::MAX);
    metrics.balancer_split_keys_per_second.set(load);
    if let Some(space) = space {
        metrics.disk_free_bytes.set(space.free_bytes as i64);
        metrics.disk_total_bytes.set(space.total_bytes as i64);
    }
    for (peer, offset_ms) in clocks.offsets() {
        let peer = format!("n{peer}");
        metrics.clock_offset_seconds.with([peer.as_str()]).set(offset_ms as f64 / 1_000.0);
    }
}
