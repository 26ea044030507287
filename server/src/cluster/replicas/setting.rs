//! The setting of read replicas: how it is changed, and what is said of it.
//!
//! Owns the way of the question to the meta group's leader and its answer. What comes of the setting is
//! planned in `enter`.

use bytes::Bytes;
use coracle_proto::limits;
use coracle_proto::reason::Reason;
use coracle_proto::shard_map::NodeId;
use coracle_proto::{peer, v1};
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;

use super::enter::{Outlook, planned, told};
use crate::cluster::knowledge::SILENT;
use crate::cluster::{Cluster, done, refused};
use crate::records::{RecordsError, Snapshot};

impl Cluster {
    /// Sets how many read replicas there shall be in a zone, from any node: asks the meta group's
    /// leader.
    pub async fn set_read_replicas(
        &self,
        request: v1::SetReadReplicasRequest,
        deadline: Instant,
    ) -> Result<v1::SetReadReplicasResponse, peer::CommandDone> {
        let kind = Kind::SetReadReplicas(Bytes::from(request.encode_to_vec()));
        let body = self.by_meta_leader(kind, deadline).await?;
        v1::SetReadReplicasResponse::decode(body).map_err(|error| refused(error.to_string()))
    }

    pub(in crate::cluster) async fn set_read_replicas_here(
        &self,
        request: v1::SetReadReplicasRequest,
    ) -> peer::CommandDone {
        let mut response = v1::SetReadReplicasResponse::default();
        let silent = |snapshot: &Snapshot| {
            let nodes = snapshot.map.nodes.iter().filter(|node| {
                let silence = self.commands.silence(NodeId(node.id));
                silence.is_none_or(|silence| silence >= SILENT)
            });
            let silent = nodes.map(|node| (node.id, Instant::now())).collect();
            Outlook { silent, ..Outlook::default() }
        };
        let changed = self.records.change_all(|snapshot| {
            let rules = &mut snapshot.map.read_replicas;
            let before = rules.clone();
            rules.retain(|rule| rule.zone != request.zone);
            if request.learners > 0 {
                let (zone, learners) = (request.zone.clone(), request.learners);
                rules.push(v1::ReadReplicas { zone, learners });
            }
            rules.sort_by(|a, b| a.zone.cmp(&b.zone));
            let wanted = rules.iter().map(|rule| u64::from(rule.learners)).sum();
            if limits::check_learners(wanted).is_err() {
                return Err(Reason::TooLarge.as_str().to_owned());
            }
            let changed = before != *rules;
            response = told(&planned(snapshot, &silent(snapshot)));
            Ok(changed && !request.validate_only)
        });
        match changed.await {
            Ok(snapshot) => {
                if !request.validate_only {
                    self.publish(&snapshot.map).await;
                }
                let body = response.encode_to_vec().into();
                peer::CommandDone { body, ..Default::default() }
            }
            Err(RecordsError::Refused(reason)) => peer::CommandDone {
                error: format!(
                    "a shard has at most {} read replicas, of all zones together",
                    limits::LEARNERS_MAX
                ),
                reason,
                ..Default::default()
            },
            Err(error @ RecordsError::Invalid(_)) => peer::CommandDone {
                error: error.to_string(),
                reason: Reason::InvalidArgument.as_str().to_owned(),
                ..Default::default()
            },
            Err(error) => done(Err(error), self),
        }
    }
}
