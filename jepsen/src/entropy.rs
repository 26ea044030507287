//! The system's randomness, as this program gives it to itself. Owns one symbol of the C library.
//!
//! A simulation hands a seed to everything that takes one. Two things take none: the standard
//! library's hash maps, and the runtime, whose fair `select!` and wake order of watchers are drawn from
//! those same hash seeds. Both ask the C library's `getrandom`, and the linker prefers ours. Seeded, it
//! is a function of the seed, so that two processes with one seed do the same; until then it passes on
//! what the kernel gives. Why not the runtime's own seed: it needs a build flag for the whole workspace.

use std::fs::File;
use std::io::Read;
use std::sync::{Mutex, PoisonError};

use coracle_storage::fs::faulty::Dice;

static SEEDED: Mutex<Option<Dice>> = Mutex::new(None);

/// From now on the system's randomness follows from the seed, for threads that begin after this.
pub(crate) fn seed(seed: u64) {
    *SEEDED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Dice::new(seed));
}

fn fill(bytes: &mut [u8]) -> bool {
    match &mut *SEEDED.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(dice) => {
            bytes.chunks_mut(8).for_each(|chunk| {
                let drawn = dice.roll().to_le_bytes();
                chunk.copy_from_slice(&drawn[..chunk.len()]);
            });
            true
        }
        None => File::open("/dev/urandom").and_then(|mut file| file.read_exact(bytes)).is_ok(),
    }
}

/// See the module.
///
/// # Safety
/// As in the C library: `buffer` is valid for `length` bytes.
#[allow(unsafe_code, reason = "the C library's interface; nothing else can stand in its place")]
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller vouches for the buffer, and keeps it to itself during the call.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, length) };
    if fill(bytes) { length as isize } else { -1 }
}
