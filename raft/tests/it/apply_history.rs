//! Random histories for the apply tests: clients that write, retry, send late and out of order,
//! leaders whose clocks jump both ways, membership changes. Knows what a client and a leader know,
//! and nothing of the state.

use std::collections::BTreeMap;

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_raft::command::{
    Change, Command, Condition, DeleteRange, NO_FENCE, Operation, Owned, Request, RequestId,
    Stamped,
};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::history::{Pin, Settings};
use proptest::prelude::*;

use crate::apply_store::{Entry, Logged};
use crate::apply_words::START_MS;

/// What the group of every history holds.
pub(crate) const ARC: (u64, u64) = (100, 1 << 63);

#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A client's next write; what it needs no more lies `lag` below.
    Write {
        client: u8,
        lag: u8,
        operations: Vec<Operation>,
        route: Route,
    },
    /// A write that was sent before is sent again, with what its client needs no more by now, or as
    /// it was.
    Again {
        which: prop::sample::Index,
        newer_mark: bool,
    },
    /// A sequence that was used before, with another birth.
    Rebirth {
        which: prop::sample::Index,
        birth_ms: i64,
    },
    /// Time passes on the leader's clock, or it jumps back.
    Time(i64),
    /// The entry is full; the next request begins another.
    Cut,
    /// A leader with another clock.
    Leader(i64),
    Advance,
    Membership,
    Describe,
    Settings(Vec<Settings>),
    /// Of a version so long ago, for so long from now.
    Pin {
        keyspace: u32,
        ago_ms: i64,
        for_ms: i64,
    },
}

#[derive(Copy, Clone, Debug)]
pub(crate) enum Route {
    Unnamed,
    Current,
    OldEpoch,
    OutsideArc,
    System,
}

fn settings() -> impl Strategy<Value = Settings> {
    let history = prop_oneof![
        2 => Just(0),
        2 => 1..10_000u64,
        1 => Just(60_000),
        2 => 60_000..1_000_000u64,
        1 => Just(u64::MAX),
    ];
    (1..3u32, history, 0..6u64).prop_map(|(keyspace, history_ms, revision)| Settings {
        keyspace,
        history_ms,
        revision,
    })
}

fn pin() -> impl Strategy<Value = Step> {
    let ago = prop_oneof![-600..2_000i64, 0..70_000i64, 500_000..700_000i64];
    let long = prop_oneof![-100..100i64, 0..100_000i64, 590_000..610_000i64];
    (1..4u32, ago, long).prop_map(|(keyspace, ago_ms, for_ms)| Step::Pin {
        keyspace,
        ago_ms,
        for_ms,
    })
}

fn operations() -> impl Strategy<Value = Operation> {
    let value = prop_oneof![Just("1"), Just("2"), Just("x"), Just("9223372036854775807")]
        .prop_map(|text| Bytes::from_static(text.as_bytes()));
    let condition = prop_oneof![
        4 => Just(None),
        1 => Just(Some(Condition::IfAbsent)),
        // Made real when it is sent: a version that was seen, or one beside it.
        1 => (0..3u64).prop_map(|off| Some(Condition::IfVersion(off))),
        1 => value.clone().prop_map(|value| Some(Condition::IfValue(value))),
    ];
    let change = prop_oneof![
        4 => (value, prop_oneof![2 => Just(0u64), 1 => 1..5_000u64, 1 => Just(u64::MAX)])
            .prop_map(|(value, ttl_ms)| Change::Put { value, ttl_ms }),
        1 => Just(Change::Delete),
        3 => (-2..3i64).prop_map(|by| Change::Increment { by }),
        1 => Just(Change::Check),
    ];
    (0..4u8, condition, change).prop_map(|(key, condition, change)| Operation {
        key: Bytes::from(vec![b'k', key]),
        condition,
        change,
    })
}

/// A delete-range over some of the keys; with a rule and a seed, some are another group's.
fn ranges() -> impl Strategy<Value = Operation> {
    let end = prop_oneof![2 => Just(None), 3 => (0..5u8).prop_map(Some)];
    let owned = proptest::option::of(0..6u64);
    let how = (any::<bool>(), owned);
    // Made real when it is sent: so many milliseconds ago.
    let fence = prop_oneof![3 => Just(NO_FENCE), 1 => 0..60u64, 1 => 60..60_000u64];
    (0..4u8, end, 1..4u32, fence, how).prop_map(|(start, end, limit, fence, (whole, seed))| {
        let end = end.map_or_else(Bytes::new, |end| Bytes::from(vec![b'k', end]));
        let owned = seed.map(|hash_seed| Owned { rule: EntityRule::Whole, hash_seed });
        let change = Change::DeleteRange(DeleteRange { end, limit, fence, whole, owned });
        Operation { key: Bytes::from(vec![b'k', start]), condition: None, change }
    })
}

pub(crate) fn steps() -> impl Strategy<Value = Step> {
    let route = prop_oneof![
        12 => Just(Route::Unnamed),
        12 => Just(Route::Current),
        1 => Just(Route::OldEpoch),
        1 => Just(Route::OutsideArc),
        1 => Just(Route::System),
    ];
    let operations = prop_oneof![
        5 => prop::collection::vec(operations(), 1..4),
        1 => ranges().prop_map(|range| vec![range]),
    ];
    let time = prop_oneof![
        8 => 0..50i64,
        2 => -400..0i64,
        3 => 1_000..30_000i64,
        2 => 60_000..130_000i64,
        1 => 600_000..700_000i64,
    ];
    let lag = prop_oneof![2 => Just(0u8), 2 => 0..5u8, 3 => Just(u8::MAX)];
    let index = any::<prop::sample::Index>();
    prop_oneof![
        20 => (0..5u8, lag, operations, route).prop_map(
            |(client, lag, operations, route)| Step::Write { client, lag, operations, route }
        ),
        10 => (index, any::<bool>())
            .prop_map(|(which, newer_mark)| Step::Again { which, newer_mark }),
        2 => (any::<prop::sample::Index>(), -2_000..1_000i64)
            .prop_map(|(which, birth_ms)| Step::Rebirth { which, birth_ms }),
        6 => time.prop_map(Step::Time),
        10 => Just(Step::Cut),
        1 => (-450..450i64).prop_map(Step::Leader),
        1 => Just(Step::Advance),
        1 => Just(Step::Membership),
        1 => Just(Step::Describe),
        2 => prop::collection::vec(settings(), 0..3).prop_map(Step::Settings),
        3 => pin(),
    ]
}

/// Turns steps into a log. It knows what a client and a leader know, and nothing of the state.
#[derive(Default)]
pub(crate) struct Writer {
    log: Vec<Entry>,
    requests: Vec<Request>,
    sent: Vec<Request>,
    next_sequence: BTreeMap<u64, u64>,
    lowest: BTreeMap<u64, u64>,
    now_ms: u64,
    skew_ms: i64,
    term: u64,
    epoch: u64,
}

impl Writer {
    pub(crate) fn log(steps: &[Step]) -> Vec<Entry> {
        let mut writer = Writer { now_ms: START_MS, term: 1, epoch: 1, ..Writer::default() };
        writer.push(Command::Describe(Descriptor { shard: 1, arc: Some(ARC), epoch: 1 }));
        steps.iter().for_each(|step| writer.step(step));
        writer.cut();
        writer.log
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write { client, lag, operations, route } => {
                self.write(u64::from(*client), *lag, operations, *route);
            }
            Step::Again { which, newer_mark } if !self.sent.is_empty() => {
                let mut request = which.get(&self.sent).clone();
                if *newer_mark {
                    let lowest = self.lowest[&request.id.client].min(request.id.sequence);
                    request.id.lowest_unanswered = request.id.lowest_unanswered.max(lowest);
                }
                self.requests.push(request);
            }
            Step::Rebirth { which, birth_ms } if !self.sent.is_empty() => {
                let mut request = which.get(&self.sent).clone();
                request.id.birth_ms = self.now_ms.saturating_add_signed(*birth_ms);
                self.sent.push(request.clone());
                self.requests.push(request);
            }
            Step::Again { .. } | Step::Rebirth { .. } => {}
            Step::Time(ms) => {
                self.cut();
                self.now_ms = self.now_ms.saturating_add_signed(*ms);
            }
            Step::Cut => self.cut(),
            Step::Leader(skew_ms) => {
                self.cut();
                self.term += 1;
                self.skew_ms = *skew_ms;
            }
            Step::Advance => {
                self.cut();
                self.push(Command::Advance);
            }
            Step::Membership => {
                self.cut();
                self.epoch += 1;
                let index = self.log.len() as u64 + 1;
                self.log.push((self.term, index, Logged::Membership));
            }
            Step::Describe => {
                self.cut();
                self.push(Command::Describe(Descriptor { shard: 9, arc: None, epoch: 77 }));
            }
            Step::Settings(settings) => {
                self.cut();
                self.push(Command::Settings(settings.clone()));
            }
            Step::Pin { keyspace, ago_ms, for_ms } => {
                self.cut();
                let version = self.now_ms.saturating_add_signed(-ago_ms) << 16;
                let until_ms = self.now_ms.saturating_add_signed(*for_ms);
                self.push(Command::Pin(Pin { keyspace: *keyspace, version, until_ms }));
            }
        }
    }

    fn write(&mut self, client: u64, lag: u8, operations: &[Operation], route: Route) {
        let sequence = self.next_sequence.entry(client).or_default();
        *sequence += 1;
        let lowest = self.lowest.entry(client).or_default();
        *lowest = (*lowest).max(sequence.saturating_sub(u64::from(lag)));
        let id = RequestId {
            client,
            sequence: *sequence,
            birth_ms: self.now_ms,
            lowest_unanswered: *lowest,
        };
        let (keyspace, position, epoch) = match route {
            Route::Unnamed => (1, 150, 0),
            Route::Current => (1, ARC.0, self.epoch),
            Route::OldEpoch => (1, 150, self.epoch + 1),
            Route::OutsideArc => (1, ARC.1, self.epoch),
            Route::System => (0, 150, 0),
        };
        let mut operations = operations.to_vec();
        for operation in &mut operations {
            if let Some(Condition::IfVersion(version)) = &mut operation.condition {
                // What a leader without skew gives to the first request of an entry.
                *version += self.now_ms << 16;
            }
            if let Change::DeleteRange(range) = &mut operation.change
                && range.fence != NO_FENCE
            {
                range.fence = (self.now_ms - range.fence) << 16;
            }
        }
        let request = Request { id, keyspace, position, epoch, operations };
        self.sent.push(request.clone());
        self.requests.push(request);
    }

    fn cut(&mut self) {
        if !self.requests.is_empty() {
            let requests = std::mem::take(&mut self.requests);
            self.push(Command::Requests(requests));
        }
    }

    fn push(&mut self, command: Command) {
        let stamp = self.now_ms.saturating_add_signed(self.skew_ms) << 16;
        let entry = Stamped { stamp, ceiling: stamp + (250 << 16), command }.encode();
        let index = self.log.len() as u64 + 1;
        self.log.push((self.term, index, Logged::Command(entry)));
    }
}
