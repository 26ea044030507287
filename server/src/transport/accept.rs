//! The accepted side: connections that other nodes dialled, their questions, our answers.
//!
//! Owns the bounds on what is accepted and on what is being answered. A reader never waits for a
//! group: it hands questions over and goes on.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::cluster_command::Kind;
use coracle_proto::peer::{ClusterCommand, CommandDone, Envelope, Forward, GroupMessage};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};

use super::directory::Standing;
use super::frame::{Broken, Pulse};
use super::gate::Gate;
use super::handshake::{self, Greeted, Reader};
use super::hub::Hub;
use super::message::{IN_FLIGHT_MAX, Item, MESSAGE_BYTES_MAX};
use super::outbox::Outbox;
use super::peer::Peer;
use crate::net::{Listener, Stream};

/// Connections that have not said who they are, and those of guests. Beyond it new ones are closed:
/// members keep theirs.
const GUESTS_MAX: usize = 128;
/// Questions of one connection that are being answered; beyond it the answer is "unreachable". An
/// honest asker has no more under way itself.
const ANSWERING_MAX: usize = IN_FLIGHT_MAX;
/// After a failed accept (no descriptors, mostly): time for some to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the transport ends.
pub(crate) async fn run(hub: Arc<Hub>, mut listener: Box<dyn Listener>) {
    let guests = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection of a peer was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(guest) = Guest::enter(&guests) else {
            tracing::warn!(address, "{GUESTS_MAX} unknown connections: one more is closed");
            continue;
        };
        let task_hub = hub.clone();
        hub.spawn("connection of a peer", async move {
            serve(&task_hub, stream, &address, guest).await;
        });
    }
}

/// A place among the guests.
struct Guest(Arc<AtomicUsize>);

impl Guest {
    fn enter(guests: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(guests.clone());
        (guests.fetch_add(1, Ordering::Relaxed) < GUESTS_MAX).then_some(place)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(hub: &Arc<Hub>, stream: Box<dyn Stream>, address: &str, guest: Guest) {
    let mut greeted = match handshake::receive(hub, stream).await {
        Ok(greeted) => greeted,
        Err(why) => {
            // Without the port: a dialler has a new one every time.
            let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
            hub.note_refusal(&format!("from {host}"), &why);
            tracing::debug!(address, %why, "a greeting failed");
            return;
        }
    };
    match greeted.standing {
        Standing::Guest => {
            let why = match handshake::welcome(hub, &mut greeted).await {
                Ok(()) => converse(hub, None, &mut greeted).await,
                Err(why) => why,
            };
            tracing::debug!(address, %why, "a guest left");
        }
        Standing::Member(node) => {
            drop(guest);
            let Some(peer) = hub.peer(node) else { return };
            serve_member(hub, &peer, greeted).await;
        }
    }
}

async fn serve_member(hub: &Arc<Hub>, peer: &Peer, mut greeted: Greeted) {
    let connection = greeted.connection;
    let start_count = greeted.from.start_count;
    let entered = hub.gates.enter(peer.node, connection, start_count, &hub.ended);
    peer.note_met();
    // The node lives: whatever could not reach it may try at once.
    peer.hurry();
    let gate = entered.gate.clone();
    let why = tokio::select! {
        biased;
        () = gate.closed.cancelled() => hub.ended_by_us(peer.node),
        why = async {
            match handshake::welcome(hub, &mut greeted).await {
                Ok(()) => converse(hub, Some((peer, &gate)), &mut greeted).await,
                Err(why) => why,
            }
        } => why,
    };
    drop(entered);
    if !matches!(why, Broken::Replaced) {
        hub.lose(peer, connection, &why);
    }
}

/// A member and the gate of its connection; None for a guest.
type Member<'a> = Option<(&'a Peer, &'a Gate)>;

/// Until the connection breaks.
async fn converse(hub: &Arc<Hub>, member: Member<'_>, greeted: &mut Greeted) -> Broken {
    let Greeted { reader, writer, pulse, from, .. } = greeted;
    let outbox = Outbox::default();
    let asker = Asker { hub, member, from, outbox: &outbox };
    let read = async {
        match asker.read_questions(reader, pulse).await {
            Err(why) => why,
            Ok(never) => match never {},
        }
    };
    let write = async {
        match outbox.write_answers(hub, writer, pulse).await {
            Err(why) => why,
            Ok(never) => match never {},
        }
    };
    tokio::select! {
        biased;
        why = read => why,
        why = write => why,
        why = pulse.watch(|| outbox.make_due()) => why,
    }
}

/// The other end of one accepted connection.
struct Asker<'a> {
    hub: &'a Arc<Hub>,
    member: Member<'a>,
    from: &'a coracle_proto::peer::KnownNode,
    outbox: &'a Outbox,
}

type Answers = FuturesUnordered<Answering>;

/// An answer that is being made.
struct Answering {
    call: u64,
    answer: Answer,
}

enum Answer {
    Group(BoxFuture<'static, Result<Bytes, String>>),
    Forward(BoxFuture<'static, Result<Bytes, String>>),
    Command(BoxFuture<'static, Kind>),
}

impl Future for Answering {
    type Output = Item;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Item> {
        let call = self.call;
        match &mut self.answer {
            Answer::Group(answer) => {
                answer.poll_unpin(context).map(|answer| group_answer(call, answer))
            }
            Answer::Forward(answer) => {
                answer.poll_unpin(context).map(|answer| forward_answer(call, answer))
            }
            Answer::Command(answer) => {
                answer.poll_unpin(context).map(|kind| command_answer(call, kind))
            }
        }
    }
}

impl Asker<'_> {
    async fn read_questions(
        &self,
        reader: &mut Reader,
        pulse: &Pulse,
    ) -> Result<Infallible, Broken> {
        let mut answers = Answers::new();
        loop {
            // When the answers are not taken, questions are not read: memory stays bounded.
            let room = self.outbox.has_room();
            tokio::select! {
                biased;
                Some(answer) = answers.next(), if !answers.is_empty() => self.outbox.push(answer),
                () = self.outbox.room.notified(), if !room => {}
                envelope = reader.next::<Envelope>(pulse), if room => {
                    self.take(envelope?, &mut answers)?;
                }
            }
        }
    }

    /// Hands an envelope's questions over, in their order.
    fn take(&self, mut envelope: Envelope, answers: &mut Answers) -> Result<(), Broken> {
        let Some((peer, gate)) = self.member else {
            if !envelope.messages.is_empty() || !envelope.forwards.is_empty() {
                return Err(Broken::Refused("a guest asks more than a guest may".into()));
            }
            self.take_command(envelope.cluster, answers);
            return Ok(());
        };
        let with_facts = envelope.facts.is_some();
        self.hub.hear(peer, &mut envelope);
        gate.pass(|| {
            let inbound = &self.hub.handlers().inbound;
            for question in envelope.messages {
                let call = question.call;
                if !self.busy(answers, || group_answer(call, Err(busy()))) {
                    let answer = inbound.question(peer.node, question);
                    answers.push(Answering { call, answer: Answer::Group(answer) });
                }
            }
            for Forward { call, body, .. } in envelope.forwards {
                if !self.busy(answers, || forward_answer(call, Err(busy()))) {
                    let answer = inbound.forward(peer.node, body);
                    answers.push(Answering { call, answer: Answer::Forward(answer) });
                }
            }
            self.take_command(envelope.cluster, answers);
            if with_facts {
                self.outbox.owe_facts();
            }
        })
    }

    fn take_command(&self, command: Option<ClusterCommand>, answers: &mut Answers) {
        let Some(ClusterCommand { call, kind }) = command else {
            return;
        };
        let Some(kind) = kind else {
            self.outbox.push(command_answer(call, failed("this command is not known here".into())));
            return;
        };
        if !self.busy(answers, || command_answer(call, failed(busy()))) {
            let answer = self.hub.handlers().inbound.command(self.from.clone(), kind);
            answers.push(Answering { call, answer: Answer::Command(answer) });
        }
    }

    /// Whether too much is being answered; then this is refused.
    fn busy(&self, answers: &Answers, refusal: impl FnOnce() -> Item) -> bool {
        let busy = answers.len() >= ANSWERING_MAX;
        if busy {
            self.outbox.push(refusal());
        }
        busy
    }
}

fn failed(error: String) -> Kind {
    Kind::Done(CommandDone { error, ..Default::default() })
}

fn busy() -> String {
    format!("{ANSWERING_MAX} questions of this connection are being answered")
}

/// Body and reason of an answer, such that a reason is never empty and a body fits a frame.
fn parts(answer: Result<Bytes, String>) -> (Bytes, String) {
    match answer {
        Ok(body) if body.len() > MESSAGE_BYTES_MAX => {
            (Bytes::new(), format!("an answer of {} bytes is over {MESSAGE_BYTES_MAX}", body.len()))
        }
        Ok(body) => (body, String::new()),
        Err(why) if why.is_empty() => (Bytes::new(), "not taken".into()),
        Err(why) => (Bytes::new(), why),
    }
}

fn group_answer(call: u64, answer: Result<Bytes, String>) -> Item {
    let (body, unreachable) = parts(answer);
    Item::Group(GroupMessage { call, answer: true, body, unreachable, ..Default::default() })
}

fn forward_answer(call: u64, answer: Result<Bytes, String>) -> Item {
    let (body, unreachable) = parts(answer);
    Item::Forward(Forward { call, answer: true, body, unreachable })
}

fn command_answer(call: u64, kind: Kind) -> Item {
    Item::Command(ClusterCommand { call, kind: Some(kind) })
}
