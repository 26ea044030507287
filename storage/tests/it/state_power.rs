//! Owns the power cuts under RocksDB: whatever operation of its files is the last, the state that a
//! restart finds is the one of some batch, whole, and no older than the last flush that answered.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

use coracle_storage::fs::faulty::Dice;
use coracle_storage::state::{Batch, Engine, Engines, OpenState, RocksEngines, StateOptions};

use crate::state_rig::dump;

/// What `fault_env.cc` offers.
#[allow(unsafe_code, reason = "the shim is C++")]
mod shim {
    use std::ffi::c_void;

    unsafe extern "C" {
        pub(super) fn coracle_power_new() -> *mut c_void;
        pub(super) fn coracle_power_free(power: *mut c_void);
        pub(super) fn coracle_power_env(power: *mut c_void) -> *mut c_void;
        pub(super) fn coracle_power_done(power: *mut c_void) -> u64;
        pub(super) fn coracle_power_cut_at(power: *mut c_void, operation: u64);
        pub(super) fn coracle_power_lose(power: *mut c_void, seed: u32) -> bool;
    }
}

/// A machine whose power can be cut under RocksDB.
struct Power(*mut c_void);

#[allow(unsafe_code, reason = "the shim is C++")]
impl Power {
    fn new() -> Power {
        // SAFETY: no arguments; freed in drop.
        Power(unsafe { shim::coracle_power_new() })
    }

    /// Engines on its files; dropped before the power is.
    fn engines(&self) -> RocksEngines {
        // SAFETY: a fresh environment, whose ownership goes to the binding.
        let env = unsafe { rocksdb::Env::from_raw(shim::coracle_power_env(self.0).cast()) };
        let quiet = Arc::new(|_: &coracle_storage::Error| {});
        RocksEngines::on_env(&StateOptions::test_min(), env, quiet).expect("options that fit")
    }

    fn done(&self) -> u64 {
        // SAFETY: alive as long as self.
        unsafe { shim::coracle_power_done(self.0) }
    }

    fn cut_at(&self, operation: u64) {
        // SAFETY: alive as long as self.
        unsafe { shim::coracle_power_cut_at(self.0, operation) }
    }

    /// 0 loses all that was not synced, other seeds a part of it.
    fn lose(&self, seed: u32) {
        // SAFETY: alive as long as self; the callers have closed their stores.
        assert!(unsafe { shim::coracle_power_lose(self.0, seed) }, "the files after the power cut");
    }
}

#[allow(unsafe_code, reason = "the shim is C++")]
impl Drop for Power {
    fn drop(&mut self) {
        // SAFETY: made by new, freed once.
        unsafe { shim::coracle_power_free(self.0) }
    }
}

type State = BTreeMap<Vec<u8>, Vec<u8>>;

const APPLIED: &[u8] = b"a-applied";

fn applied(state: &State) -> u64 {
    let bytes = state.get(APPLIED).map(|bytes| bytes.as_slice().try_into().expect("eight bytes"));
    bytes.map_or(0, u64::from_be_bytes)
}

fn state(engine: &dyn Engine) -> State {
    dump(engine).into_iter().collect()
}

/// The next batch, as apply makes them: data and the position that it reaches.
fn next(before: &State, dice: &mut Dice) -> (Batch, State) {
    let (mut batch, mut after) = (Batch::new(), before.clone());
    for _ in 0..1 + dice.below(4) {
        let key = format!("k{}", dice.below(24)).into_bytes();
        if dice.one_in(4) {
            batch.delete(key.clone());
            after.remove(&key);
        } else {
            let value = vec![dice.below(256) as u8; 1 + dice.below(6_000) as usize];
            batch.put(key.clone(), value.clone());
            after.insert(key, value);
        }
    }
    let index = (applied(before) + 1).to_be_bytes().to_vec();
    batch.put(APPLIED, index.clone());
    after.insert(APPLIED.to_vec(), index);
    (batch, after)
}

/// Lives of one store, each ended by a power cut. Returns how many cuts came in the middle of a flush
/// or a compaction.
fn lives(seed: u64) -> u64 {
    let mut dice = Dice::new(seed);
    let temporary = tempfile::tempdir().expect("a temporary directory");
    let dir = temporary.path().join("1");
    let power = Power::new();
    // The states that a restart may find: from the last flush that answered, to the newest.
    let mut possible = vec![State::new()];
    let (mut exists, mut in_the_middle) = (false, 0);
    for _ in 0..6 {
        power.cut_at(power.done() + 1 + dice.below(60));
        let engines = power.engines();
        let create = OpenState { create: true };
        if let Ok(engine) = engines.open(&dir, create) {
            exists = true;
            possible = vec![found(&*engine, &possible, seed)];
            for _ in 0..40 {
                let (batch, after) = next(possible.last().expect("never empty"), &mut dice);
                if engine.write(batch).is_err() {
                    break;
                }
                possible.push(after);
                let settled = match dice.below(12) {
                    0..=2 => engine.flush(),
                    3 => engine.compact(None),
                    _ => continue,
                };
                if settled.is_err() {
                    in_the_middle += 1;
                    break;
                }
                possible = possible.split_off(possible.len() - 1);
            }
        }
        drop(engines);
        power.lose(dice.below(3) as u32);
    }
    let engines = power.engines();
    let engine = engines.open(&dir, OpenState { create: !exists }).expect("the power is back");
    found(&*engine, &possible, seed);
    in_the_middle
}

/// What stands in the store, which must be one of what may.
fn found(engine: &dyn Engine, possible: &[State], seed: u64) -> State {
    let state = state(engine);
    assert!(
        possible.contains(&state),
        "seed {seed}: a restart found the state at {}, of {:?}, and not as it was",
        applied(&state),
        possible.iter().map(applied).collect::<Vec<_>>()
    );
    state
}

#[test]
fn a_power_cut_at_any_operation_leaves_a_whole_state_no_older_than_the_last_flush() {
    let in_the_middle: u64 = (0..40).map(lives).sum();
    assert!(in_the_middle >= 20, "only {in_the_middle} cuts hit a flush or compaction");
}

#[test]
fn what_was_not_flushed_is_gone_and_what_was_is_there() {
    let temporary = tempfile::tempdir().expect("a temporary directory");
    let dir = temporary.path().join("1");
    let power = Power::new();
    let write = |engine: &dyn Engine, value: &'static [u8]| {
        let mut batch = Batch::new();
        batch.put(&b"k"[..], value);
        engine.write(batch).expect("a healthy store");
    };
    let engines = power.engines();
    let open = |engines: &RocksEngines, create| engines.open(Path::new(&dir), OpenState { create });
    let engine = open(&engines, true).expect("a new store");
    write(&*engine, b"flushed");
    engine.flush().expect("a healthy disk");
    write(&*engine, b"not flushed");
    drop((engine, engines));
    power.lose(0);
    let engines = power.engines();
    let engine = open(&engines, false).expect("the power is back");
    assert_eq!(dump(&*engine), [(b"k".to_vec(), b"flushed".to_vec())]);
}
