//! Owns the network of a simulation: byte streams between named hosts, as the nodes' and the clients'
//! seams want them. What travels on one connection is in `pipe`; what happens to links and hosts is
//! decided elsewhere and set here. Does not look into the bytes.
//!
//! It behaves as TCP does: what is sent arrives in order, or not at all. A blocked link holds bytes
//! back until it is healed; a host that lost its power answers nothing until it is back, and then
//! resets what it no longer knows; a process that died resets at once.

mod pipe;
mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use coracle_server::net::{Accepted, Listener, Net, Stream};
use coracle_storage::fs::faulty::Dice;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use self::pipe::{Connection, End, Item, Pipe, Pull, Push};
use self::stream::SimStream;
use crate::trace::Trace;

/// How long messages take.
#[derive(Clone, Copy, Debug)]
pub struct LinkSpeed {
    /// At least.
    pub latency_ms_min: u64,
    /// At most, as a rule.
    pub latency_ms_max: u64,
    /// One in so many takes ten times as long.
    pub slow_one_in: u64,
}

/// How a host goes down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Down {
    /// The process ends: its peers are told.
    Process,
    /// The power goes: nobody is told.
    Power,
}

/// What a run saw of the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetStats {
    /// Connections that stood.
    pub connections: u64,
    /// Connections that were reset on purpose.
    pub resets: u64,
}

/// The network. Clones are the same.
#[derive(Clone)]
pub struct SimNet {
    world: Arc<Mutex<World>>,
    /// Changes when links are healed or hosts come back.
    changes: Arc<watch::Sender<u64>>,
}

struct World {
    seed: u64,
    speed: LinkSpeed,
    trace: Trace,
    listeners: BTreeMap<String, (String, mpsc::UnboundedSender<Accepted>)>,
    /// Whose an address was last.
    owners: BTreeMap<String, String>,
    /// How often each host went down.
    lives: BTreeMap<String, u64>,
    /// Hosts without power.
    dark: BTreeSet<String>,
    blocked: BTreeSet<(String, String)>,
    slow: BTreeMap<(String, String), u64>,
    /// Connections so far, by dialler and address: numbers that make up each one's luck.
    dialled: BTreeMap<(String, String), u64>,
    connections: BTreeMap<u64, Connection>,
    last: u64,
    stats: NetStats,
}

impl SimNet {
    /// A network on which all is well.
    pub fn new(seed: u64, speed: LinkSpeed, trace: Trace) -> SimNet {
        let world = World {
            seed,
            speed,
            trace,
            listeners: BTreeMap::new(),
            owners: BTreeMap::new(),
            lives: BTreeMap::new(),
            dark: BTreeSet::new(),
            blocked: BTreeSet::new(),
            slow: BTreeMap::new(),
            dialled: BTreeMap::new(),
            connections: BTreeMap::new(),
            last: 0,
            stats: NetStats::default(),
        };
        SimNet { world: Arc::new(Mutex::new(world)), changes: Arc::new(watch::Sender::new(0)) }
    }

    /// The network as one host sees it, until it goes down: its next life asks again.
    pub fn host(&self, name: &str) -> Arc<Host> {
        let life = self.world.lock().life(name);
        Arc::new(Host { net: self.clone(), name: name.to_owned(), life })
    }

    /// Nothing passes from one host to the other, until it is healed.
    pub fn block(&self, from: &str, to: &str) {
        self.world.lock().blocked.insert((from.to_owned(), to.to_owned()));
    }

    /// Messages from one host to the other take so many times as long; 1 is as always.
    pub fn slow(&self, from: &str, to: &str, times: u64) {
        self.world.lock().slow.insert((from.to_owned(), to.to_owned()), times);
    }

    /// Ends all blocks and slownesses. What was held back arrives as it is sent again.
    pub fn heal(&self) {
        let woken = {
            let mut world = self.world.lock();
            world.slow.clear();
            let blocked = std::mem::take(&mut world.blocked);
            let mut woken = Vec::new();
            for connection in world.connections.values_mut() {
                for side in 0..2 {
                    let way = connection.way(side);
                    if blocked.contains(&way) {
                        woken.extend(connection.pipes[side].retransmit());
                    }
                }
            }
            woken
        };
        self.changed(woken);
    }

    /// Resets every connection between two hosts, at both ends.
    pub fn reset(&self, one: &str, other: &str) {
        let mut woken = Vec::new();
        {
            let mut world = self.world.lock();
            let mut resets = 0;
            for connection in world.connections.values_mut() {
                let hosts = [connection.hosts[0].as_str(), connection.hosts[1].as_str()];
                if hosts == [one, other] || hosts == [other, one] {
                    connection.ends = [End::Reset; 2];
                    woken.extend(connection.wakers());
                    resets += 1;
                }
            }
            world.stats.resets += resets;
        }
        self.changed(woken);
    }

    /// A host goes down with everything that it has open. Whoever still holds a stream of it, on that
    /// host, can neither send nor hear.
    pub fn take_down(&self, host: &str, how: Down) {
        let mut woken = Vec::new();
        {
            let mut world = self.world.lock();
            *world.lives.entry(host.to_owned()).or_default() += 1;
            world.listeners.retain(|_, (owner, _)| owner != host);
            if how == Down::Power {
                world.dark.insert(host.to_owned());
            }
            for connection in world.connections.values_mut() {
                for side in 0..2 {
                    if connection.hosts[side] == host {
                        woken.extend(connection.die(side, how == Down::Process));
                    }
                }
            }
            world.sweep();
        }
        self.changed(woken);
    }

    /// A host has power. What it had open before, it no longer knows: whoever sends there is told.
    pub fn bring_up(&self, host: &str) {
        let mut woken = Vec::new();
        {
            let mut world = self.world.lock();
            if world.dark.remove(host) {
                for connection in world.connections.values_mut() {
                    for side in 0..2 {
                        if connection.hosts[side] == host && connection.ends[side] == End::Dead {
                            woken.extend(connection.answer_with_reset(side));
                        }
                    }
                }
            }
        }
        self.changed(woken);
    }

    /// What was seen so far.
    pub fn stats(&self) -> NetStats {
        self.world.lock().stats
    }

    fn changed(&self, woken: Vec<Waker>) {
        woken.into_iter().for_each(Waker::wake);
        self.changes.send_modify(|changes| *changes += 1);
    }

    async fn connect(self, from: String, life: u64, address: String) -> io::Result<SimStream> {
        let mut changes = self.changes.subscribe();
        let (number, round_trip) = self.world.lock().begin_dial(&from, &address);
        tokio::time::sleep(round_trip).await;
        loop {
            changes.borrow_and_update();
            let dialled = {
                let mut world = self.world.lock();
                match world.life(&from) == life {
                    true => world.open(&self, &from, &address, number),
                    false => Dialled::NoAnswer,
                }
            };
            match dialled {
                Dialled::Stands(stream) => return Ok(stream),
                Dialled::Refused => return Err(io::ErrorKind::ConnectionRefused.into()),
                // The caller's own timeout ends the wait.
                Dialled::NoAnswer => {
                    let _ = changes.changed().await;
                }
            }
        }
    }

    fn pull(&self, number: u64, side: usize, room: usize, context: &mut Context<'_>) -> Pull {
        let mut world = self.world.lock();
        let world = &mut *world;
        let Some(connection) = world.connections.get_mut(&number) else {
            return Pull::Broken;
        };
        let is_blocked = world.blocked.contains(&connection.way(1 - side));
        let (pulled, woken) = connection.pull(side, room, is_blocked, context);
        if let Pull::Bytes(_) = &pulled {
            // Not how many bytes: gRPC's answers carry the real time of day, packed.
            world.trace.message(&[number, side as u64]);
        }
        if let Some(waker) = woken {
            waker.wake();
        }
        pulled
    }

    fn push(&self, number: u64, side: usize, data: &[u8], context: &mut Context<'_>) -> Push {
        let mut world = self.world.lock();
        let world = &mut *world;
        let Some(connection) = world.connections.get_mut(&number) else {
            return Push::Broken;
        };
        let (there, back) = (connection.way(side), connection.way(1 - side));
        let is_heard = !world.blocked.contains(&there) && !world.blocked.contains(&back);
        let is_dark = world.dark.contains(&there.1);
        let times = world.slow.get(&there).copied().unwrap_or(1);
        let item = Item::Data(Bytes::copy_from_slice(data));
        let (pushed, woken) = connection.push(side, item, times, is_heard, is_dark, context);
        if let Some(waker) = woken {
            waker.wake();
        }
        pushed
    }

    fn finish(&self, number: u64, side: usize) {
        let mut world = self.world.lock();
        let woken = match world.connections.get_mut(&number) {
            Some(connection) => connection.finish(side),
            None => None,
        };
        drop(world);
        if let Some(waker) = woken {
            waker.wake();
        }
    }

    fn close(&self, number: u64, side: usize) {
        self.finish(number, side);
        let mut world = self.world.lock();
        let mut woken = None;
        if let Some(connection) = world.connections.get_mut(&number) {
            woken = connection.close(side);
        }
        world.sweep();
        drop(world);
        if let Some(waker) = woken {
            waker.wake();
        }
    }
}

enum Dialled {
    Stands(SimStream),
    Refused,
    NoAnswer,
}

impl World {
    fn life(&self, host: &str) -> u64 {
        self.lives.get(host).copied().unwrap_or(0)
    }

    /// A number of the dialling, and how long it takes there and back.
    fn begin_dial(&mut self, from: &str, address: &str) -> (u64, Duration) {
        let number = self.dialled.entry((from.to_owned(), address.to_owned())).or_default();
        *number += 1;
        let number = *number;
        let mut dice = self.luck(from, address, number, 2);
        let ms = self.speed.draw(&mut dice) + self.speed.draw(&mut dice);
        (number, Duration::from_millis(ms))
    }

    fn open(&mut self, net: &SimNet, from: &str, address: &str, number: u64) -> Dialled {
        let Some(owner) = self.owners.get(address).cloned() else {
            return Dialled::Refused;
        };
        let is_cut = self.blocked.contains(&(from.to_owned(), owner.clone()))
            || self.blocked.contains(&(owner.clone(), from.to_owned()));
        if is_cut || self.dark.contains(&owner) {
            return Dialled::NoAnswer;
        }
        // A node that is stopping has let go of its listener.
        let listening = self.listeners.get(address).filter(|(_, incoming)| !incoming.is_closed());
        let Some((_, incoming)) = listening else {
            return Dialled::Refused;
        };
        let incoming = incoming.clone();
        self.last += 1;
        let id = self.last;
        let pipe = |side| Pipe::new(self.luck(from, address, number, side), self.speed);
        let connection = Connection::new([from.to_owned(), owner], [pipe(0), pipe(1)]);
        self.connections.insert(id, connection);
        self.stats.connections += 1;
        self.trace.detail(format_args!("connection {id}: from {from} to {address}"));
        let far = SimStream::new(net.clone(), id, 1);
        let sent = incoming.send((Box::new(far), format!("{from}:1")));
        assert!(sent.is_ok(), "nobody lets go of a listener within one step of the run");
        Dialled::Stands(SimStream::new(net.clone(), id, 0))
    }

    /// The luck of one direction of one connection depends on nothing else that goes on.
    fn luck(&self, from: &str, address: &str, number: u64, side: u64) -> Dice {
        let mut seed = self.seed ^ number.rotate_left(32) ^ side;
        for byte in from.bytes().chain([b'>']).chain(address.bytes()) {
            seed = Dice::new(seed ^ u64::from(byte)).roll();
        }
        Dice::new(seed)
    }

    /// Forgets connections that nobody holds any more.
    fn sweep(&mut self) {
        self.connections.retain(|_, connection| !connection.is_over());
    }
}

impl LinkSpeed {
    fn draw(&self, dice: &mut Dice) -> u64 {
        let span = self.latency_ms_max.saturating_sub(self.latency_ms_min);
        let ms = self.latency_ms_min + dice.below(span + 1);
        if dice.one_in(self.slow_one_in) { ms * 10 } else { ms }
    }
}

/// The network as one host sees it: the nodes' seam and the clients'.
pub struct Host {
    net: SimNet,
    name: String,
    life: u64,
}

impl Host {
    fn dial(&self, address: &str) -> impl Future<Output = io::Result<SimStream>> + use<> {
        self.net.clone().connect(self.name.clone(), self.life, address.to_owned())
    }
}

impl Net for Host {
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let dialling = self.dial(address);
        Box::pin(async move { Ok(Box::new(dialling.await?) as Box<dyn Stream>) })
    }

    fn listen(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Listener>>> {
        let (sender, incoming) = mpsc::unbounded_channel();
        let mut world = self.net.world.lock();
        if world.life(&self.name) != self.life {
            return Box::pin(std::future::ready(Err(io::ErrorKind::NetworkDown.into())));
        }
        world.owners.insert(address.to_owned(), self.name.clone());
        world.listeners.insert(address.to_owned(), (self.name.clone(), sender));
        let listener = SimListener { incoming, address: address.to_owned() };
        Box::pin(std::future::ready(Ok(Box::new(listener) as Box<dyn Listener>)))
    }
}

impl coracle_client::net::Net for Host {
    fn connect(&self, address: &str) -> coracle_client::net::Connecting {
        let dialling = self.dial(address);
        Box::pin(
            async move { Ok(Box::new(dialling.await?) as Box<dyn coracle_client::net::Stream>) },
        )
    }
}

struct SimListener {
    incoming: mpsc::UnboundedReceiver<Accepted>,
    address: String,
}

impl Listener for SimListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Accepted>> {
        Box::pin(async move {
            match self.incoming.recv().await {
                Some(accepted) => Ok(accepted),
                // The host is down: nothing will ever come.
                None => std::future::pending().await,
            }
        })
    }

    fn local_address(&self) -> String {
        self.address.clone()
    }
}

fn at(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}
