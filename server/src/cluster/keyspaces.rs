//! Keyspaces: how they come into the records, and their settings from there into the groups.
//!
//! Owns creating and changing them through the meta group's leader, and handing settings to the groups
//! that this node leads. A group goes by what stands in its own log; nothing there looks at the map.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits::HISTORY_DEFAULT;
use coracle_proto::reason::Reason;
use coracle_proto::shard_map::{META_SHARD, SYSTEM_KEYSPACE_NAME, ShardId, ShardMap};
use coracle_proto::{peer, v1};
use coracle_raft::group::Group;
use coracle_raft::history::Settings;
use coracle_raft::leadership::Standing;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Cluster, RECONCILE_INTERVAL, done, refused};
use crate::records::RecordsError;

/// How long one group may take to adopt settings: one without a quorum must not hold up the others.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(1);

impl Cluster {
    /// Creates a keyspace, from any node: asks the meta group's leader.
    pub async fn create_keyspace(
        &self,
        request: v1::CreateKeyspaceRequest,
        deadline: Instant,
    ) -> Result<v1::Keyspace, peer::CommandDone> {
        let kind = Kind::CreateKeyspace(Bytes::from(request.encode_to_vec()));
        keyspace_of(self.by_meta_leader(kind, deadline).await?)
    }

    /// Changes a keyspace's settings, from any node: asks the meta group's leader.
    pub async fn update_keyspace(
        &self,
        request: v1::UpdateKeyspaceRequest,
        deadline: Instant,
    ) -> Result<v1::Keyspace, peer::CommandDone> {
        let kind = Kind::UpdateKeyspace(Bytes::from(request.encode_to_vec()));
        keyspace_of(self.by_meta_leader(kind, deadline).await?)
    }

    pub(super) async fn create_keyspace_here(&self, body: Bytes) -> peer::CommandDone {
        let request = match v1::CreateKeyspaceRequest::decode(body) {
            Ok(request) => request,
            Err(error) => return refused(format!("not a request: {error}")),
        };
        let validate_only = request.validate_only;
        let mut created = None;
        let changed = self.records.change(|map, ids| {
            let asked = asked_history(request.has_history, request.history_ms);
            let whole =
                v1::EntityRule { kind: Some(v1::entity_rule::Kind::Whole(v1::WholeKey {})) };
            let keyspace = v1::Keyspace {
                id: ids.next_keyspace,
                name: request.name.clone(),
                entity_rule: request.entity_rule.or(Some(whole)),
                history_ms: asked.unwrap_or(HISTORY_DEFAULT.as_millis() as u64),
                revision: 1,
            };
            if let Some(there) = map.keyspaces.iter().find(|there| there.name == request.name) {
                // The caller may not have heard that it succeeded.
                let (id, revision) = (there.id, there.revision);
                if (v1::Keyspace { id, revision, ..keyspace }) == *there {
                    created = Some(there.clone());
                    return Ok(false);
                }
                return Err(Reason::KeyspaceExists.as_str().to_owned());
            }
            ids.next_keyspace += 1;
            map.keyspaces.push(keyspace.clone());
            created = Some(keyspace);
            Ok(!validate_only)
        });
        let changed = changed.await;
        let why = format!("a keyspace named {} exists, with other settings", request.name);
        let map = changed.map(|snapshot| snapshot.map);
        self.keyspace_changed(map, created, validate_only, why).await
    }

    pub(super) async fn update_keyspace_here(&self, body: Bytes) -> peer::CommandDone {
        let request = match v1::UpdateKeyspaceRequest::decode(body) {
            Ok(request) => request,
            Err(error) => return refused(format!("not a request: {error}")),
        };
        let mut updated = None;
        let changed = self.records.change(|map, _| {
            let named = |there: &&mut v1::Keyspace| there.name == request.name;
            let named = map.keyspaces.iter_mut().find(named);
            let Some(there) = named.filter(|there| there.name != SYSTEM_KEYSPACE_NAME) else {
                return Err(Reason::UnknownKeyspace.as_str().to_owned());
            };
            let asked = asked_history(request.has_history, request.history_ms);
            let history_ms = asked.unwrap_or(there.history_ms);
            let changes = history_ms != there.history_ms;
            if changes {
                there.history_ms = history_ms;
                there.revision += 1;
            }
            updated = Some(there.clone());
            Ok(changes && !request.validate_only)
        });
        let changed = changed.await;
        let why = format!("there is no keyspace named {}", request.name);
        let map = changed.map(|snapshot| snapshot.map);
        self.keyspace_changed(map, updated, request.validate_only, why).await
    }

    /// The answer to a change. `why` is said where the change itself refused, by its reason.
    async fn keyspace_changed(
        &self,
        changed: Result<v1::ShardMap, RecordsError>,
        keyspace: Option<v1::Keyspace>,
        validate_only: bool,
        why: String,
    ) -> peer::CommandDone {
        match changed {
            Ok(map) => {
                // What was only checked is in no record, and must not be in any cached map.
                if !validate_only {
                    self.publish(&map).await;
                }
                let body = keyspace.expect("set by the change that was taken").encode_to_vec();
                peer::CommandDone { body: body.into(), ..Default::default() }
            }
            Err(RecordsError::Refused(reason)) => {
                peer::CommandDone { error: why, reason, ..Default::default() }
            }
            Err(error @ RecordsError::Invalid(_)) => peer::CommandDone {
                error: error.to_string(),
                reason: Reason::InvalidArgument.as_str().to_owned(),
                ..Default::default()
            },
            Err(error) => done(Err(error), self),
        }
    }

    /// Hands the keyspaces' settings to every group that this node leads and that lacks them.
    pub async fn settle_keyspaces(&self, stop: CancellationToken) {
        // In which term a group was found to have all that a map of this epoch holds.
        let mut settled: BTreeMap<ShardId, (u64, u64)> = BTreeMap::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RECONCILE_INTERVAL) => {}
            }
            let Some(map) = self.map.current() else { continue };
            let groups = self.host.groups();
            let mut adopting = Vec::new();
            for group in groups.iter().filter(|group| group.shard() != META_SHARD) {
                let status = group.status();
                let looked = (status.term, map.epoch().0);
                if status.state != Standing::Leader || settled.get(&group.shard()) == Some(&looked)
                {
                    continue;
                }
                let lacking = lacking(group, &map);
                if lacking.is_empty() {
                    settled.insert(group.shard(), looked);
                } else {
                    // In time or not, it is looked at again.
                    adopting.push(tokio::time::timeout(ADOPT_TIMEOUT, group.adopt(lacking)));
                }
            }
            futures_util::future::join_all(adopting).await;
        }
    }
}

fn keyspace_of(body: Bytes) -> Result<v1::Keyspace, peer::CommandDone> {
    v1::Keyspace::decode(body).map_err(|error| refused(error.to_string()))
}

/// The settings that a map has and a group lacks.
fn lacking(group: &Group, map: &ShardMap) -> Vec<Settings> {
    let newer =
        map.keyspaces().filter(|known| known.revision > group.settings_revision(known.id.0));
    let settings = newer.map(|known| Settings {
        keyspace: known.id.0,
        history_ms: known.history_ms,
        revision: known.revision,
    });
    settings.collect()
}

/// The history that a request asks for.
fn asked_history(has_history: bool, history_ms: u64) -> Option<u64> {
    (has_history || history_ms > 0).then_some(history_ms)
}
