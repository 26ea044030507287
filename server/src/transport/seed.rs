//! Addresses of which the node is not known: seeds, and one question to whoever is there.
//!
//! Owns connections as a guest, which carry gossip and cluster commands and end soon.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::peer::cluster_command::Kind;
use coracle_proto::peer::{ClusterCommand, Envelope};
use coracle_raft::transport::TransportError;
use coracle_raft::types::NodeId;
use tokio::time::{Instant, timeout, timeout_at};

use super::frame::Broken;
use super::handshake::{self, Greeted};
use super::hub::Hub;
use super::message::Connection;

/// Between two attempts at a seed, and between two greetings of a node without a cluster.
const PAUSE: Duration = Duration::from_secs(1);
/// Instead, as long as nothing ever answered: nodes that start together find each other soon.
const FIRST_PAUSES_MS: [u64; 4] = [50, 100, 200, 400];
/// While a question waits for its answer, this often something is said, so that the other end knows
/// that the asker lives.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

/// Greets whoever is at `address` until a member of this node's cluster answers; it is known from
/// then on.
pub(crate) async fn run(hub: Arc<Hub>, address: String) {
    let mut pauses = FIRST_PAUSES_MS.iter();
    loop {
        match handshake::dial(&hub, &address, 0, Connection::Control).await {
            Ok(Greeted { from, .. }) => {
                hub.note_accord(&address);
                if hub.directory(|directory| directory.get(NodeId(from.node)).is_some()) {
                    return;
                }
                pauses = [].iter();
            }
            Err(Broken::Myself) => return,
            Err(why) => hub.note_refusal(&address, &why),
        }
        let pause = pauses.next().map_or(PAUSE, |ms| Duration::from_millis(*ms));
        // Whether it was time or the node's identity: greet again.
        let _ = timeout(pause, hub.identity_given.notified()).await;
    }
}

/// Asks whoever is at `address`.
pub(crate) async fn command(
    hub: &Arc<Hub>,
    address: &str,
    kind: Kind,
    within: Duration,
) -> Result<Kind, TransportError> {
    match timeout(within, ask(hub, address, kind)).await {
        Ok(Ok(kind)) => Ok(kind),
        Ok(Err(why)) => Err(TransportError::Unreachable(format!("{address}: {why}"))),
        Err(_) => Err(TransportError::Timeout(within)),
    }
}

async fn ask(hub: &Arc<Hub>, address: &str, kind: Kind) -> Result<Kind, Broken> {
    let Greeted { mut reader, mut writer, pulse, .. } =
        handshake::dial(hub, address, 0, Connection::Control).await?;
    let question = ClusterCommand { call: 1, kind: Some(kind) };
    let mut envelope = Envelope { cluster: Some(question), ..Default::default() };
    loop {
        writer.send(&envelope, &pulse).await?;
        envelope = Envelope::default();
        let quiet_until = Instant::now() + SIGN_OF_LIFE;
        while let Ok(answer) = timeout_at(quiet_until, reader.next::<Envelope>(&pulse)).await {
            let Some(answer) = answer?.cluster else {
                continue;
            };
            return answer.kind.ok_or_else(|| Broken::Malformed("an unknown answer".into()));
        }
    }
}
