//! Owns a node's wall clock in simulation: it starts off, runs at a rate of its own, and jumps when
//! told to. Durations are not its business: they come from the runtime's clock.

use std::sync::Arc;

use coracle_server::clock::Clock;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Wall time when a run begins: some moment in 2023, the same for every run.
const EPOCH_MS: u64 = 1_700_000_000_000;

/// A wall clock. Clones are the same clock; it outlives its node's restarts.
#[derive(Clone)]
pub struct SimClock(Arc<Mutex<State>>);

struct State {
    began: Instant,
    offset_ms: i64,
    /// Parts per million that it is too fast.
    drift_ppm: i64,
}

impl SimClock {
    /// A clock that is off by so much, and runs wrong by so much.
    pub fn new(offset_ms: i64, drift_ppm: i64) -> SimClock {
        SimClock(Arc::new(Mutex::new(State { began: Instant::now(), offset_ms, drift_ppm })))
    }

    /// Sets it forward, or back.
    pub fn jump(&self, by_ms: i64) {
        self.0.lock().offset_ms += by_ms;
    }

    /// Sets it right, as NTP would; it goes on running wrong.
    pub fn set_right(&self) {
        let mut state = self.0.lock();
        state.offset_ms = 0;
        state.offset_ms = -state.error_ms();
    }

    /// How far it is ahead.
    pub fn error_ms(&self) -> i64 {
        self.0.lock().error_ms()
    }
}

impl State {
    fn error_ms(&self) -> i64 {
        let elapsed_ms = self.began.elapsed().as_millis() as i64;
        self.offset_ms + elapsed_ms * self.drift_ppm / 1_000_000
    }
}

impl Clock for SimClock {
    fn now_ms(&self) -> u64 {
        let state = self.0.lock();
        let elapsed_ms = state.began.elapsed().as_millis() as u64;
        (EPOCH_MS + elapsed_ms).saturating_add_signed(state.error_ms())
    }
}
