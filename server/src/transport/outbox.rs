//! The answers of one accepted connection that wait to be written.
//!
//! Owns their order and their bound. Does not know the questions (see `accept`).

use std::collections::VecDeque;
use std::convert::Infallible;

use coracle_proto::peer::Envelope;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::frame::{Broken, Pulse};
use super::handshake::Writer;
use super::hub::Hub;
use super::message::{IN_FLIGHT_MAX, Item, Packer};

/// Answers that wait to be written, in number and bytes; beyond it the connection is not read.
const OUTBOX_MAX: usize = 2 * IN_FLIGHT_MAX;
const OUTBOX_BYTES_MAX: usize = 32 << 20;

/// Answers that wait to be written.
#[derive(Default)]
pub(crate) struct Outbox {
    state: Mutex<OutboxState>,
    stir: Notify,
    /// Told when there is room again.
    pub(crate) room: Notify,
}

#[derive(Default)]
struct OutboxState {
    items: VecDeque<Item>,
    bytes: usize,
    /// The next envelope carries facts: heartbeats are answered with them.
    facts: bool,
    /// An envelope shall leave, empty if need be.
    due: bool,
}

impl Outbox {
    pub(crate) fn push(&self, item: Item) {
        let mut state = self.state.lock();
        state.bytes += item.bytes();
        state.items.push_back(item);
        drop(state);
        self.stir.notify_one();
    }

    /// Facts go with the next answer, or with the next sign of life.
    pub(crate) fn owe_facts(&self) {
        self.state.lock().facts = true;
    }

    pub(crate) fn make_due(&self) {
        self.state.lock().due = true;
        self.stir.notify_one();
    }

    pub(crate) fn has_room(&self) -> bool {
        self.state.lock().has_room()
    }

    pub(crate) async fn write_answers(
        &self,
        hub: &Hub,
        writer: &mut Writer,
        pulse: &Pulse,
    ) -> Result<Infallible, Broken> {
        loop {
            let (mut envelope, facts) = loop {
                if let Some(taken) = self.take() {
                    break taken;
                }
                self.stir.notified().await;
            };
            if facts {
                envelope.facts = Some(hub.handlers().events.facts());
            }
            writer.send(&envelope, pulse).await?;
        }
    }

    fn take(&self) -> Option<(Envelope, bool)> {
        let mut state = self.state.lock();
        if state.items.is_empty() && !state.due {
            return None;
        }
        let had_room = state.has_room();
        let mut packer = Packer::default();
        while let Some(item) = state.items.pop_front() {
            if !packer.fits(&item) {
                state.items.push_front(item);
                break;
            }
            state.bytes -= item.bytes();
            packer.add(item);
        }
        state.due = false;
        let facts = std::mem::take(&mut state.facts);
        if !had_room && state.has_room() {
            self.room.notify_one();
        }
        Some((packer.envelope, facts))
    }
}

impl OutboxState {
    fn has_room(&self) -> bool {
        self.items.len() < OUTBOX_MAX && self.bytes < OUTBOX_BYTES_MAX
    }
}
