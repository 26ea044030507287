//! The dialled side: one task for each lane of a peer connects, asks, and takes the answers.
//!
//! Owns reconnecting and its pauses. What to send is decided by `lane`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::peer::Envelope;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_util::sync::CancellationToken;

use super::directory::Standing;
use super::frame::{Broken, Pulse};
use super::handshake::{self, Greeted, Reader, Writer};
use super::hub::Hub;
use super::lane::Lane;
use super::message::Connection;
use super::peer::Peer;

/// The pause after a failure, doubled with each up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Starts the tasks of a peer.
pub(crate) fn spawn(hub: &Arc<Hub>, peer: &Arc<Peer>) {
    for lane in peer.lanes() {
        let (task_hub, peer, lane) = (hub.clone(), peer.clone(), lane.clone());
        hub.spawn("connection to a peer", async move {
            let closes = Closes(&lane);
            let ended = peer.ended.clone();
            ended.run_until_cancelled(keep(&task_hub, &peer, &lane)).await;
            drop(closes);
        });
    }
}

/// Closes the lane however its task ends.
struct Closes<'a>(&'a Lane);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Keeps one lane connected, once it was wanted.
async fn keep(hub: &Arc<Hub>, peer: &Arc<Peer>, lane: &Lane) {
    let connection = lane.connection();
    // Each lane has a generator of its own, so that its pauses do not depend on the others' luck.
    let mut rng = StdRng::seed_from_u64(
        hub.seed
            ^ (peer.node.0.rotate_left(8) | connection as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
    );
    let mut failures = 0;
    loop {
        lane.wanted().await;
        match connect(hub, peer, connection).await {
            Ok((mut greeted, standing)) => {
                failures = 0;
                peer.note_met();
                lane.up();
                let why = tokio::select! {
                    biased;
                    () = standing.cancelled() => hub.ended_by_us(peer.node),
                    why = converse(hub, peer, lane, &mut greeted) => why,
                };
                if peer.ended.is_cancelled() {
                    return;
                }
                lane.down(&format!("the connection to node {} broke: {why}", peer.node));
                hub.lose(peer, connection, &why);
            }
            Err(why) => {
                hub.note_refusal(&format!("by node {}", peer.node), &why);
                lane.down(&format!("node {} is not reached: {why}", peer.node));
            }
        }
        // Signs of life shorten the pause, but never to nothing: a connection that breaks as soon as it
        // stands would otherwise be dialled in a circle.
        tokio::time::sleep(PAUSE_MIN / 2).await;
        lane.rest(pause(failures, rng.random_range(0.5..1.0))).await;
        failures += 1;
    }
}

/// `PAUSE_MIN`, doubled for each failure up to `PAUSE_MAX`, times a draw that keeps many nodes from
/// dialling one in step.
fn pause(failures: u32, draw: f64) -> Duration {
    PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX).mul_f64(draw)
}

/// A connection to the newest start of the node, and what ends it from this side.
async fn connect(
    hub: &Arc<Hub>,
    peer: &Peer,
    connection: Connection,
) -> Result<(Greeted, CancellationToken), Broken> {
    if hub.is_cut(peer.node) {
        return Err(Broken::Cut);
    }
    let address =
        hub.directory(|directory| directory.get(peer.node).map(|known| known.peer_address.clone()));
    let Some(address) = address else {
        return Err(Broken::Refused("the node was forgotten".into()));
    };
    let greeted = handshake::dial(hub, &address, peer.node.0, connection).await?;
    if greeted.standing != Standing::Member(peer.node) {
        return Err(Broken::Refused(format!("{address} has no cluster yet")));
    }
    // First the token, then the look at what would have cancelled it: nothing slips between.
    let standing = peer.standing();
    let newest = hub.directory(|directory| {
        directory.get(peer.node).is_some_and(|known| known.start_count == greeted.from.start_count)
    });
    if !newest || hub.is_cut(peer.node) {
        return Err(hub.ended_by_us(peer.node));
    }
    hub.note_accord(&format!("by node {}", peer.node));
    Ok((greeted, standing))
}

/// Until the connection breaks.
async fn converse(hub: &Arc<Hub>, peer: &Peer, lane: &Lane, greeted: &mut Greeted) -> Broken {
    let Greeted { reader, writer, pulse, told, .. } = greeted;
    let read = async {
        match read_answers(hub, peer, lane, reader, pulse).await {
            Err(why) => why,
            Ok(never) => match never {},
        }
    };
    let write = async {
        match write_questions(hub, lane, writer, pulse, *told).await {
            Err(why) => why,
            Ok(never) => match never {},
        }
    };
    tokio::select! {
        biased;
        why = read => why,
        why = write => why,
        why = pulse.watch(|| lane.make_due()) => why,
    }
}

async fn read_answers(
    hub: &Arc<Hub>,
    peer: &Peer,
    lane: &Lane,
    reader: &mut Reader,
    pulse: &Pulse,
) -> Result<Infallible, Broken> {
    loop {
        let mut envelope: Envelope = reader.next(pulse).await?;
        hub.hear(peer, &mut envelope);
        lane.answered(envelope);
    }
}

async fn write_questions(
    hub: &Arc<Hub>,
    lane: &Lane,
    writer: &mut Writer,
    pulse: &Pulse,
    mut told: u64,
) -> Result<Infallible, Broken> {
    loop {
        let (mut envelope, heartbeats) = lane.next_envelope().await;
        if heartbeats {
            envelope.facts = Some(hub.handlers().events.facts());
        }
        if lane.connection() == Connection::Control {
            (envelope.known, told) = hub.directory(|directory| directory.changed_since(told));
        }
        writer.send(&envelope, pulse).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_are_bounded() {
        let at = |failures| pause(failures, 1.0).as_millis();
        assert_eq!([at(0), at(1), at(4), at(5), at(1000)], [20, 40, 320, 500, 500]);
        assert_eq!(pause(0, 0.5), PAUSE_MIN / 2);
    }
}
