//! The first frame, both ways, under a time limit.
//!
//! Owns the exchange on a new connection; afterwards both ends know who the other is and what the
//! connection may carry. Who is let in is judged by `directory`.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::peer::{Hello, KnownNode};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::time::{Instant, timeout};

use super::directory::Standing;
use super::frame::{Broken, FRAME_BYTES_MAX, FrameReader, FrameWriter, HELLO_BYTES_MAX, Pulse};
use super::hub::Hub;
use super::message::Connection;
use crate::net::Stream;

/// An attempt to connect: within it a machine in the same region answers, or it is down.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Both Hellos. Longer than a connect, because the other process may be busy.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) type Reader = FrameReader<ReadHalf<Box<dyn Stream>>>;
pub(crate) type Writer = FrameWriter<WriteHalf<Box<dyn Stream>>>;

/// A connection on which both ends have said who they are.
pub(crate) struct Greeted {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    pub(crate) pulse: Pulse,
    pub(crate) from: KnownNode,
    pub(crate) standing: Standing,
    pub(crate) connection: Connection,
    /// The version of the directory that our Hello told.
    pub(crate) told: u64,
}

/// Connects and greets. `to_node` 0: whoever is there, as a guest.
pub(crate) async fn dial(
    hub: &Arc<Hub>,
    address: &str,
    to_node: u64,
    connection: Connection,
) -> Result<Greeted, Broken> {
    let stream = timeout(CONNECT_TIMEOUT, hub.net.connect(address))
        .await
        .map_err(|_| Broken::Slow("connection"))??;
    let greet = async {
        let (mut reader, mut writer) = halves(stream);
        let pulse = Pulse::default();
        let (hello, told) = hub.directory(|directory| {
            let now = Instant::now();
            let hello = directory.hello(to_node, connection.wire(), now, String::new());
            (hello, directory.version())
        });
        writer.send(&hello, &pulse).await?;
        let answer: Hello = reader.next(&pulse).await?;
        let standing = hub.admit(&answer, to_node)?;
        reader.set_bytes_max(FRAME_BYTES_MAX);
        let from = answer.from.unwrap_or_default();
        Ok(Greeted { reader, writer, pulse, from, standing, connection, told })
    };
    timeout(HELLO_TIMEOUT, greet).await.map_err(|_| Broken::Slow("greeting"))?
}

/// The other end of `dial`. The answer is sent by `welcome`, when the connection has its place.
pub(crate) async fn receive(hub: &Arc<Hub>, stream: Box<dyn Stream>) -> Result<Greeted, Broken> {
    let receive = async {
        let (mut reader, mut writer) = halves(stream);
        let pulse = Pulse::default();
        let hello: Hello = reader.next(&pulse).await?;
        let judged =
            hub.admit(&hello, 0).and_then(|standing| match Connection::from_wire(hello.lane) {
                Some(connection) => Ok((standing, connection)),
                None => Err(Broken::Refused(format!("lane {} is unknown", hello.lane))),
            });
        match judged {
            Ok((standing, connection)) => {
                reader.set_bytes_max(FRAME_BYTES_MAX);
                let from = hello.from.unwrap_or_default();
                Ok(Greeted { reader, writer, pulse, from, standing, connection, told: 0 })
            }
            Err(why) => {
                refuse(hub, &hello, &why, &mut writer, &pulse).await?;
                Err(why)
            }
        }
    };
    timeout(HELLO_TIMEOUT, receive).await.map_err(|_| Broken::Slow("greeting"))?
}

/// Answers the Hello of a connection that is let in.
pub(crate) async fn welcome(hub: &Arc<Hub>, greeted: &mut Greeted) -> Result<(), Broken> {
    let to_node = match greeted.standing {
        Standing::Member(node) => node.0,
        Standing::Guest => 0,
    };
    let hello = hub.directory(|directory| {
        directory.hello(to_node, greeted.connection.wire(), Instant::now(), String::new())
    });
    timeout(HELLO_TIMEOUT, greeted.writer.send(&hello, &greeted.pulse))
        .await
        .map_err(|_| Broken::Slow("greeting"))?
}

/// Tells why not, unless the network is to look cut.
async fn refuse(
    hub: &Arc<Hub>,
    hello: &Hello,
    why: &Broken,
    writer: &mut Writer,
    pulse: &Pulse,
) -> Result<(), Broken> {
    let said = match why {
        Broken::Cut => return Ok(()),
        Broken::Refused(why) => why.clone(),
        other => other.to_string(),
    };
    let mut answer =
        hub.directory(|directory| directory.hello(0, hello.lane, Instant::now(), said));
    if answer.cluster_id != hello.cluster_id {
        answer.known.clear();
    }
    writer.send(&answer, pulse).await
}

fn halves(stream: Box<dyn Stream>) -> (Reader, Writer) {
    let (read, write) = tokio::io::split(stream);
    (FrameReader::new(read, HELLO_BYTES_MAX), FrameWriter::new(write))
}
