//! Owns one connection: two ends, and a pipe each way with what is under way in it. Pure but for the
//! runtime's clock. Does not know the links: whether one is blocked comes in with each call.

use std::collections::VecDeque;
use std::task::{Context, Waker};

use bytes::Bytes;
use coracle_storage::fs::faulty::Dice;
use tokio::time::Instant;

use super::{LinkSpeed, at};

/// Bytes under way in one direction, as in a socket's buffers: beyond it the sender waits.
const IN_FLIGHT_BYTES_MAX: usize = 256 << 10;

/// After a block ends, the sender's next try may be so far away.
const RETRANSMIT_MS_MAX: u64 = 200;

/// One end of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    /// In use.
    Open,
    /// Whoever held it let go of it.
    Closed,
    /// It has learned that the connection is broken.
    Reset,
    /// Its host went down.
    Dead,
}

/// What travels.
pub(super) enum Item {
    /// Bytes.
    Data(Bytes),
    /// Nothing more will come.
    Finish,
    /// The other end does not know this connection.
    Reset,
}

/// What a reader gets.
pub(super) enum Pull {
    Bytes(Bytes),
    End,
    /// There is something, but it arrives later.
    Until(Instant),
    Wait,
    Broken,
}

/// What a writer gets.
pub(super) enum Push {
    Taken,
    Wait,
    Broken,
}

/// One direction.
pub(super) struct Pipe {
    dice: Dice,
    speed: LinkSpeed,
    items: VecDeque<(Instant, Item)>,
    bytes: usize,
    last: Instant,
    is_finished: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    pub(super) fn new(dice: Dice, speed: LinkSpeed) -> Pipe {
        Pipe {
            dice,
            speed,
            items: VecDeque::new(),
            bytes: 0,
            last: Instant::now(),
            is_finished: false,
            reader: None,
            writer: None,
        }
    }

    /// What was held back is sent again, in order.
    pub(super) fn retransmit(&mut self) -> Option<Waker> {
        let again = at(self.dice.below(RETRANSMIT_MS_MAX + 1));
        for (arrives, _) in &mut self.items {
            *arrives = (*arrives).max(again);
        }
        self.last = self.last.max(again);
        self.reader.take()
    }

    fn send(&mut self, item: Item, times: u64) -> Option<Waker> {
        if let Item::Data(bytes) = &item {
            self.bytes += bytes.len();
        }
        let arrives = at(self.speed.draw(&mut self.dice) * times).max(self.last);
        self.last = arrives;
        self.items.push_back((arrives, item));
        // Behind something else it changes nothing for the reader.
        if self.items.len() == 1 { self.reader.take() } else { None }
    }
}

/// Two ends, two pipes: `pipes[side]` carries what `side` sends.
pub(super) struct Connection {
    pub(super) hosts: [String; 2],
    pub(super) ends: [End; 2],
    pub(super) pipes: [Pipe; 2],
}

impl Connection {
    pub(super) fn new(hosts: [String; 2], pipes: [Pipe; 2]) -> Connection {
        Connection { hosts, ends: [End::Open; 2], pipes }
    }

    /// From whom to whom a pipe goes.
    pub(super) fn way(&self, side: usize) -> (String, String) {
        (self.hosts[side].clone(), self.hosts[1 - side].clone())
    }

    /// Whether nobody holds it any more.
    pub(super) fn is_over(&self) -> bool {
        self.ends.iter().all(|end| matches!(end, End::Closed | End::Dead))
    }

    pub(super) fn wakers(&mut self) -> Vec<Waker> {
        let wakers =
            self.pipes.iter_mut().flat_map(|pipe| [pipe.reader.take(), pipe.writer.take()]);
        wakers.flatten().collect()
    }

    /// The host of this end goes down. A process that dies leaves a system that tells the other end.
    pub(super) fn die(&mut self, side: usize, is_told: bool) -> Vec<Waker> {
        let was_open = self.ends[side] == End::Open;
        self.ends[side] = End::Dead;
        if is_told && was_open {
            self.pipes[side].send(Item::Reset, 1);
        }
        self.wakers()
    }

    /// The host of a dead end is back: if anything is on its way there, it answers with a reset.
    pub(super) fn answer_with_reset(&mut self, side: usize) -> Option<Waker> {
        let is_asked = !self.pipes[1 - side].items.is_empty();
        if is_asked { self.pipes[side].send(Item::Reset, 1) } else { None }
    }

    pub(super) fn pull(
        &mut self,
        side: usize,
        room: usize,
        is_blocked: bool,
        context: &mut Context<'_>,
    ) -> (Pull, Option<Waker>) {
        if matches!(self.ends[side], End::Reset | End::Dead) {
            return (Pull::Broken, None);
        }
        let pipe = &mut self.pipes[1 - side];
        pipe.reader = Some(context.waker().clone());
        let Some((arrives, item)) = pipe.items.front_mut() else {
            return (Pull::Wait, None);
        };
        if is_blocked {
            return (Pull::Wait, None);
        }
        if *arrives > Instant::now() {
            return (Pull::Until(*arrives), None);
        }
        match item {
            Item::Finish => (Pull::End, None),
            Item::Reset => {
                self.ends[side] = End::Reset;
                // Who waits to send is told as well.
                (Pull::Broken, self.pipes[side].writer.take())
            }
            Item::Data(bytes) => {
                let taken = bytes.split_to(room.min(bytes.len()));
                if bytes.is_empty() {
                    pipe.items.pop_front();
                }
                pipe.bytes -= taken.len();
                (Pull::Bytes(taken), pipe.writer.take())
            }
        }
    }

    /// `is_heard`: what the other end's system answers comes back. `is_dark`: its host has no power.
    pub(super) fn push(
        &mut self,
        side: usize,
        item: Item,
        times: u64,
        is_heard: bool,
        is_dark: bool,
        context: &mut Context<'_>,
    ) -> (Push, Option<Waker>) {
        if self.ends[side] != End::Open || self.pipes[side].is_finished {
            return (Push::Broken, None);
        }
        match self.ends[1 - side] {
            End::Closed if is_heard => return (Push::Broken, None),
            End::Dead if is_heard && !is_dark => {
                // The system there does not know the connection.
                let woken = self.pipes[1 - side].send(Item::Reset, times);
                return (Push::Taken, woken);
            }
            _ => {}
        }
        let pipe = &mut self.pipes[side];
        if pipe.bytes >= IN_FLIGHT_BYTES_MAX {
            pipe.writer = Some(context.waker().clone());
            return (Push::Wait, None);
        }
        (Push::Taken, pipe.send(item, times))
    }

    /// This end sends nothing more.
    pub(super) fn finish(&mut self, side: usize) -> Option<Waker> {
        let pipe = &mut self.pipes[side];
        if self.ends[side] != End::Open || std::mem::replace(&mut pipe.is_finished, true) {
            return None;
        }
        pipe.send(Item::Finish, 1)
    }

    /// This end is let go of; who waits to send to it need not wait any more.
    pub(super) fn close(&mut self, side: usize) -> Option<Waker> {
        if self.ends[side] != End::Dead {
            self.ends[side] = End::Closed;
        }
        self.pipes[1 - side].writer.take()
    }
}
