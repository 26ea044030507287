//! What a node keeps of itself in its data directory, beside the log and the shards.
//!
//! Owns the files `IDENTITY` (through `identity`), `PEERS`, `MAP` (the cached shard map, so that a
//! cluster that starts anew routes before its meta group leads), `INIT` (the plan of an init that was
//! begun here), `JOIN` (the number under which this node asks to be let in) and `SALT` (the number that keeps clients' bytes from passing for log records).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use coracle_proto::{peer, v1};
use coracle_raft::types::NodeId;
use coracle_storage::fs::{Fs, read_file, write_file_atomic};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use crate::cluster::Membership;
use crate::identity::{ClusterId, Error, Fresh, Identity, Locking, Opened, Peer, Peers};

/// Who this node is, once it is in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// The cluster.
    pub cluster_id: String,
    /// The node.
    pub node: NodeId,
    /// Seed of the position hash.
    pub hash_seed: u64,
    /// Which start of the node this is.
    pub start_count: u64,
}

/// The data directory.
pub struct Home {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    fresh: Mutex<Option<Fresh>>,
    /// Keeps the directory's lock.
    identity: Mutex<Option<Identity>>,
    peers: Mutex<Peers>,
    own: watch::Sender<Option<Own>>,
}

impl Home {
    /// Opens the directory; an existing node's start counter is raised and synced.
    pub fn open(fs: Arc<dyn Fs>, dir: &Path, locking: Locking) -> Result<Arc<Self>, Error> {
        let (fresh, identity) = match Identity::open(fs.clone(), dir, locking)? {
            Opened::Fresh(fresh) => (Some(fresh), None),
            Opened::Existing(identity) => (None, Some(identity)),
        };
        let peers = Peers::load(&*fs, dir)?;
        let own = watch::Sender::new(identity.as_ref().map(own_of));
        Ok(Arc::new(Self {
            fs,
            dir: dir.to_owned(),
            fresh: Mutex::new(fresh),
            identity: Mutex::new(identity),
            peers: Mutex::new(peers),
            own,
        }))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Who this node is; `None` before init or join.
    pub fn own(&self) -> Option<Own> {
        self.own.borrow().clone()
    }

    /// Waits until the node is in a cluster.
    pub async fn joined(&self) -> Own {
        let mut own = self.own.subscribe();
        let joined = own.wait_for(Option::is_some).await;
        joined.expect("the sender lives in self").clone().expect("waited for")
    }

    /// The nodes that this one has met before.
    pub fn known(&self) -> Vec<peer::KnownNode> {
        let known = |(node, peer): (NodeId, &Peer)| peer::KnownNode {
            node: node.0,
            peer_address: peer.peer_address.clone(),
            address: peer.client_address.clone(),
            zone: peer.zone.clone(),
            start_count: peer.start_count,
            http_address: peer.http_address.clone(),
            ..Default::default()
        };
        self.peers.lock().iter().map(known).collect()
    }

    /// Remembers a node beyond a restart. Blocks on the disk.
    pub fn remember(&self, known: &peer::KnownNode) {
        let peer = Peer {
            peer_address: known.peer_address.clone(),
            client_address: known.address.clone(),
            http_address: known.http_address.clone(),
            zone: known.zone.clone(),
            start_count: known.start_count,
        };
        let mut peers = self.peers.lock();
        if !peers.hear(NodeId(known.node), peer) {
            return;
        }
        if let Err(error) = peers.save(&*self.fs, &self.dir) {
            // They will be heard of again; only a whole cluster at new addresses would miss them.
            tracing::warn!(%error, "the known nodes could not be written");
        }
    }

    /// The map of before the restart.
    pub fn map(&self) -> Option<v1::ShardMap> {
        v1::ShardMap::decode(&*self.read("MAP")?).ok()
    }

    /// Keeps a map for the next start. Blocks on the disk.
    pub fn keep_map(&self, map: &v1::ShardMap) {
        if let Err(error) = self.write("MAP", &map.encode_to_vec()) {
            tracing::warn!(error, "the shard map could not be kept for the next start");
        }
    }

    /// The salt of the node's log; `fresh` becomes it on the first start. Durable when it returns.
    pub fn salt(&self, fresh: u64) -> Result<u64, String> {
        let path = self.dir.join("SALT");
        if self.fs.exists(&path) {
            let bytes = read_file(&*self.fs, &path)
                .map_err(|error| format!("{}: {error}", self.path("SALT")))?;
            let salt = bytes.try_into().map(u64::from_be_bytes);
            return salt.map_err(|_| {
                format!("{}: damaged; without it the log cannot be read", self.path("SALT"))
            });
        }
        let log = self.dir.join("log");
        let begun = self.fs.exists(&log)
            && !self.fs.read_dir(&log).map_err(|error| error.to_string())?.is_empty();
        if begun {
            // Another salt would make every record of the log look torn.
            return Err(format!(
                "{}: gone, but the log that it belongs to is there. Put the file back, or remove the whole data directory and start it as a new node",
                self.path("SALT")
            ));
        }
        self.write("SALT", &fresh.to_be_bytes())?;
        Ok(fresh)
    }

    /// The number under which this node asks to be let in; `fresh` becomes it when it first asks. The
    /// same after a restart, so that a cluster that has let it in already knows it again.
    pub fn join_nonce(&self, fresh: u64) -> Result<u64, String> {
        let kept = self.read("JOIN").and_then(|bytes| bytes.try_into().ok());
        if let Some(kept) = kept {
            return Ok(u64::from_be_bytes(kept));
        }
        self.write("JOIN", &fresh.to_be_bytes())?;
        Ok(fresh)
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.dir.join(name);
        let bytes = self.fs.exists(&path).then(|| read_file(&*self.fs, &path))?;
        bytes
            .inspect_err(|error| tracing::warn!(%error, path = %path.display(), "not readable"))
            .ok()
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        write_file_atomic(&*self.fs, &self.dir.join(name), bytes)
            .map_err(|error| format!("{}: {error}", self.path(name)))
    }
}

fn own_of(identity: &Identity) -> Own {
    Own {
        cluster_id: identity.cluster_id().as_str().to_owned(),
        node: identity.node_id(),
        hash_seed: identity.hash_seed(),
        start_count: identity.start_count(),
    }
}

impl Membership for Home {
    fn identity(&self) -> Option<(String, NodeId)> {
        self.own.borrow().as_ref().map(|own| (own.cluster_id.clone(), own.node))
    }

    fn adopt(&self, adopt: &peer::Adopt) -> Result<(), String> {
        let mut fresh = self.fresh.lock();
        if let Some((cluster, node)) = self.identity() {
            if cluster == adopt.cluster_id && node.0 == adopt.node {
                return Ok(());
            }
            return Err(format!("this node is {node} of cluster {cluster} already"));
        }
        let cluster = ClusterId::parse(&adopt.cluster_id)
            .ok_or_else(|| format!("{:?} is no cluster id", adopt.cluster_id))?;
        if adopt.node == 0 {
            return Err("0 is no node id".to_owned());
        }
        let taken = fresh.take().ok_or("an earlier attempt failed: restart this node")?;
        let identity = taken.adopt(cluster, NodeId(adopt.node), adopt.hash_seed);
        let identity = identity.map_err(|error| error.to_string())?;
        self.own.send_replace(Some(own_of(&identity)));
        *self.identity.lock() = Some(identity);
        Ok(())
    }

    fn plan(&self) -> Option<Bytes> {
        self.read("INIT").map(Bytes::from)
    }

    fn keep_plan(&self, plan: &[u8]) -> Result<(), String> {
        self.write("INIT", plan)
    }

    fn drop_plan(&self) {
        if !self.fs.exists(&self.dir.join("INIT")) {
            return;
        }
        if let Err(error) = self.fs.remove_file(&self.dir.join("INIT")) {
            tracing::warn!(%error, "the plan of a refused init was not removed");
        }
    }
}
