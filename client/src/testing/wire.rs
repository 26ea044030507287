//! Owns the network of a fake cluster: in-memory connections that a test can break, freeze and
//! refuse, with a real gRPC server at their other end. Does not serve (see `services`).

use std::collections::BTreeMap;
use std::io;

use coracle_proto::limits::MESSAGE_BYTES_MAX;
use coracle_proto::v1::admin_service_server::AdminServiceServer;
use coracle_proto::v1::cluster_service_server::ClusterServiceServer;
use coracle_proto::v1::kv_service_server::KvServiceServer;
use tokio::io::{copy_bidirectional, duplex};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Duration, sleep};
use tonic::transport::Server;

use super::services::Node;
use super::{FakeCluster, node_at};
use crate::net::{Connecting, Net, Stream};
use crate::topology::NodeId;

/// What may be under way in one direction of a connection.
const BUFFER_BYTES: usize = 64 << 10;

/// Connecting takes a moment, so that nothing happens in no time.
const CONNECT_DELAY: Duration = Duration::from_millis(1);

/// The ways to all nodes.
pub(super) struct Links(BTreeMap<NodeId, Link>);

struct Link {
    is_up: bool,
    is_frozen: watch::Sender<bool>,
    connections: Vec<AbortHandle>,
}

impl Links {
    pub(super) fn new(nodes: impl IntoIterator<Item = NodeId>) -> Links {
        let link =
            || Link { is_up: true, is_frozen: watch::Sender::new(false), connections: Vec::new() };
        Links(nodes.into_iter().map(|node| (node, link())).collect())
    }

    fn of(&mut self, node: NodeId) -> &mut Link {
        self.0.get_mut(&node).unwrap_or_else(|| panic!("there is no node {node}"))
    }

    /// Breaks all connections of a node.
    pub(super) fn cut(&mut self, node: NodeId) {
        self.of(node).connections.drain(..).for_each(|connection| connection.abort());
    }

    /// Whether a node takes connections.
    pub(super) fn set_up(&mut self, node: NodeId, is_up: bool) {
        self.of(node).is_up = is_up;
    }

    /// Whether anything passes on a node's connections.
    pub(super) fn set_frozen(&mut self, node: NodeId, is_frozen: bool) {
        self.of(node).is_frozen.send_replace(is_frozen);
    }

    /// Connections that stand.
    pub(super) fn count(&self) -> usize {
        let connections = self.0.values().flat_map(|link| &link.connections);
        connections.filter(|connection| !connection.is_finished()).count()
    }
}

impl Net for FakeCluster {
    fn connect(&self, address: &str) -> Connecting {
        let (cluster, node) = (self.clone(), node_at(address));
        Box::pin(async move {
            sleep(CONNECT_DELAY).await;
            let node = node.ok_or_else(|| io::Error::from(io::ErrorKind::HostUnreachable))?;
            let mut state = cluster.state.lock();
            let link = state.links.of(node);
            if !link.is_up {
                return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
            }
            let (client, mut near) = duplex(BUFFER_BYTES);
            let (mut far, server) = duplex(BUFFER_BYTES);
            let mut is_frozen = link.is_frozen.subscribe();
            let passing = tokio::spawn(async move {
                // Frozen for good: a paused process is cut off, and connected to anew, to be back.
                let frozen = tokio::select! {
                    biased;
                    frozen = is_frozen.wait_for(|frozen| *frozen) => frozen.is_ok(),
                    _ = copy_bidirectional(&mut near, &mut far) => false,
                };
                if frozen {
                    std::future::pending().await
                }
            });
            link.connections.retain(|connection| !connection.is_finished());
            link.connections.push(passing.abort_handle());
            drop(state);
            let node = Node { id: node, cluster: cluster.clone() };
            let kv = KvServiceServer::new(node.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let server_end = tokio_stream::once(Ok::<_, io::Error>(server));
            let serving = Server::builder()
                .add_service(kv)
                .add_service(ClusterServiceServer::new(node.clone()))
                .add_service(AdminServiceServer::new(node))
                .serve_with_incoming(server_end);
            tokio::spawn(async move {
                if let Err(error) = serving.await {
                    tracing::debug!(%error, "a fake node's server ended");
                }
            });
            Ok(Box::new(client) as Box<dyn Stream>)
        })
    }
}
