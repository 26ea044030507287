//! Owns the nodes that this node has met, in the file `PEERS`: where they are and which start of theirs
//! it was. So a cluster that comes back at new addresses finds itself. Does not dial anybody, nor refuse
//! anybody (a rolled-back or copied directory shows in the handshake: see `transport`).

use std::collections::BTreeMap;
use std::path::Path;

use coracle_raft::types::NodeId;
use coracle_storage::Fs;
use coracle_storage::fs::{read_file, write_file_atomic};

use super::Error;
use super::file::{Fields, Reader};

const PEERS: &str = "PEERS";

/// A node as others know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its peer listener, `host:port`.
    pub peer_address: String,
    /// Its public listener, `host:port`.
    pub client_address: String,
    /// Its HTTP listener, `host:port`.
    pub http_address: String,
    /// Its failure domain.
    pub zone: String,
    /// Which of its starts said so: a later one's word holds.
    pub start_count: u64,
}

/// The known nodes. Changes are made in memory; [`Peers::save`] makes them durable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    known: BTreeMap<NodeId, Peer>,
}

impl Peers {
    /// Reads the directory's `PEERS`; none means none known.
    pub fn load(fs: &dyn Fs, dir: &Path) -> Result<Peers, Error> {
        let path = dir.join(PEERS);
        if !fs.exists(&path) {
            return Ok(Peers::default());
        }
        let bytes = read_file(fs, &path).map_err(|error| Error::io(&path, error))?;
        let mut reader = Reader::new(&path, &bytes)?;
        let mut known = BTreeMap::new();
        while let Some(line) = reader.next_if("peer") {
            let (node, peer) =
                parse(line).ok_or_else(|| reader.damaged(format!("{line:?} is no peer")))?;
            known.insert(node, peer);
        }
        reader.end()?;
        Ok(Peers { known })
    }

    /// Writes them as one step: after a crash there are the old ones or these. Durable when it
    /// returns.
    pub fn save(&self, fs: &dyn Fs, dir: &Path) -> Result<(), Error> {
        let mut fields = Fields::new("The nodes that this node has met. Written by the node.");
        for (node, peer) in &self.known {
            fields.put(
                "peer",
                format_args!(
                    "{} start_count={} peer={} client={} http={} zone={}",
                    node.0,
                    peer.start_count,
                    peer.peer_address,
                    peer.client_address,
                    peer.http_address,
                    peer.zone
                ),
            );
        }
        let path = dir.join(PEERS);
        write_file_atomic(fs, &path, &fields.finish()).map_err(|error| Error::io(&path, error))
    }

    /// That node, if it is known.
    pub fn get(&self, node: NodeId) -> Option<&Peer> {
        self.known.get(&node)
    }

    /// All of them, by id.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Peer)> {
        self.known.iter().map(|(node, peer)| (*node, peer))
    }

    /// A node was met, or was told of: the later start's word holds. True when that is news, and worth
    /// saving.
    pub fn hear(&mut self, node: NodeId, peer: Peer) -> bool {
        let later = self.known.get(&node).is_none_or(|known| peer.start_count > known.start_count);
        later && self.put(node, peer)
    }

    /// The node has left the cluster. Its id is never given again, so nothing is lost with it.
    pub fn forget(&mut self, node: NodeId) -> bool {
        self.known.remove(&node).is_some()
    }

    fn put(&mut self, node: NodeId, peer: Peer) -> bool {
        // What comes from the network must not be able to write lines of its own.
        let fits = [&peer.peer_address, &peer.client_address, &peer.http_address, &peer.zone]
            .into_iter()
            .all(|word| is_word(word));
        if node.0 == 0 || !fits {
            return false;
        }
        self.known.insert(node, peer.clone()) != Some(peer)
    }
}

/// The longest host name, and a port.
const WORD_BYTES_MAX: usize = 256 + 6;

/// May be empty, but never ends a field or a line.
fn is_word(text: &str) -> bool {
    text.len() <= WORD_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn parse(line: &str) -> Option<(NodeId, Peer)> {
    let mut words = line.split(' ');
    let node = words.next()?.parse().ok()?;
    let mut field = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
    let peer = Peer {
        start_count: field("start_count")?.parse().ok()?,
        peer_address: field("peer")?.to_owned(),
        client_address: field("client")?.to_owned(),
        http_address: field("http")?.to_owned(),
        zone: field("zone")?.to_owned(),
    };
    words.next().is_none().then_some((NodeId(node), peer))
}
