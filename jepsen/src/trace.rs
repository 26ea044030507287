//! Owns the trace of a run: every fault, operation and delivered message, folded into one hash, and
//! printed where that is asked for. Two runs of a seed must have the same. Does not judge.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How much of a trace is printed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, PartialOrd, Ord)]
pub enum Detail {
    /// Nothing.
    #[default]
    Silent,
    /// Faults, operations, elections.
    Events,
    /// Every delivered message as well: to find where two runs part.
    Messages,
}

/// The trace of one run. Clones are the same trace.
#[derive(Clone)]
pub struct Trace {
    began: Instant,
    detail: Detail,
    state: Arc<Mutex<State>>,
}

struct State {
    hash: u64,
    events: u64,
    messages: u64,
}

impl Trace {
    /// Begins now, on the runtime's clock.
    pub fn begin(detail: Detail) -> Trace {
        // The offset basis of FNV-1a.
        let state = State { hash: 0xcbf2_9ce4_8422_2325, events: 0, messages: 0 };
        Trace { began: Instant::now(), detail, state: Arc::new(Mutex::new(state)) }
    }

    /// Time since the run began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The same in microseconds.
    pub fn now_us(&self) -> u64 {
        self.elapsed().as_micros() as u64
    }

    /// Something worth a line.
    pub fn event(&self, what: fmt::Arguments<'_>) {
        self.line(what, Detail::Events);
    }

    /// Something worth a line only where messages are looked at.
    pub fn detail(&self, what: fmt::Arguments<'_>) {
        self.line(what, Detail::Messages);
    }

    fn line(&self, what: fmt::Arguments<'_>, from: Detail) {
        let now = self.now_us();
        let line = what.to_string();
        let mut state = self.state.lock();
        state.events += 1;
        state.fold(&now.to_le_bytes());
        state.fold(line.as_bytes());
        drop(state);
        if self.detail >= from {
            println!("{:>10.3}  {line}", now as f64 / 1_000.0);
        }
    }

    /// One of the many: numbers that say what was delivered.
    pub fn message(&self, numbers: &[u64]) {
        let now = self.now_us();
        let mut state = self.state.lock();
        state.messages += 1;
        state.fold(&now.to_le_bytes());
        for number in numbers {
            state.fold(&number.to_le_bytes());
        }
        drop(state);
        if self.detail >= Detail::Messages {
            println!("{:>10.3}  message {numbers:?}", now as f64 / 1_000.0);
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.state.lock().hash
    }

    /// Messages delivered so far.
    pub fn messages(&self) -> u64 {
        self.state.lock().messages
    }
}

impl State {
    /// FNV-1a.
    fn fold(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
