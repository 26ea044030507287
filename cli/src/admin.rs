//! The operators' commands. Owns what they share: the picture of a cluster as its nodes tell it.

pub mod cluster;
pub mod config;
pub mod context;
pub mod health;
pub mod keyspace;
pub mod leave;
pub mod node;
pub mod operation;
pub mod pages;
pub mod plan;
pub mod rebalance;
pub mod replica;
pub mod reshape;
pub mod ring;
pub mod shard;
pub mod wait;

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_client::admin::NodeStatus;
use coracle_client::topology::{Node, NodeState};
use coracle_client::{Client, ClusterMap, NodeId, ShardId};
use futures_util::future::join_all;

use crate::args::Global;
use crate::context::{Environment, Target, resolve};
use crate::failure::Failure;

/// How long a node may take to say how it is. Longer means that it is down, or as good as.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// A cluster, as the map has it and as its nodes see themselves.
pub struct Picture {
    /// The map.
    pub map: ClusterMap,
    /// The nodes that answered.
    pub nodes: BTreeMap<NodeId, NodeStatus>,
}

impl Picture {
    /// Asks every node, all at once.
    pub async fn take(client: &Client) -> Result<Picture, Failure> {
        let admin = client.admin();
        let map = admin.map().await.map_err(|error| Failure::call("read the shard map", &error))?;
        let asked = map.nodes.iter().map(|node| {
            let admin = admin.clone();
            async move {
                let status = admin.node_status(&node.address);
                let status = tokio::time::timeout(STATUS_TIMEOUT, status).await;
                // Another node may have got the address of one that is gone.
                let status =
                    status.ok().and_then(Result::ok).filter(|found| found.node.id == node.id);
                status.map(|status| (node.id, status))
            }
        });
        let nodes = join_all(asked).await.into_iter().flatten().collect();
        Ok(Picture { map, nodes })
    }

    /// What the map and the node itself say that it is doing; apart from whether it answers.
    pub fn state(&self, node: &Node) -> NodeState {
        match self.nodes.get(&node.id) {
            Some(status) if status.draining && node.state == NodeState::Active => {
                NodeState::Draining
            }
            _ => node.state,
        }
    }

    /// Who leads which shard.
    pub fn leaders(&self) -> BTreeMap<ShardId, NodeId> {
        let shards = self.map.shards.iter();
        let led = shards.map(|shard| (shard.id, health::leader(shard, &self.nodes)));
        led.filter_map(|(shard, leader)| leader.map(|leader| (shard, leader))).collect()
    }

    /// Takes the picture of the cluster that the command line means.
    pub async fn of(global: &Global) -> Result<Picture, Failure> {
        let (_, client) = client(global).await?;
        Picture::take(&client).await
    }
}

/// The cluster that the command line means, and a client for it.
pub async fn client(global: &Global) -> Result<(Target, Client), Failure> {
    let target = resolve(global, &Environment::read())?;
    let client = target.client(global).await?;
    Ok((target, client))
}
