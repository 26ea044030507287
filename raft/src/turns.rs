//! Turns: what is done to the same thing is done one after the other, what is done to others at the
//! same time.
//!
//! Owns who waits for whom. Does not know what is done.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// Turns by name. Whoever needs several takes them in one order everywhere.
#[derive(Debug)]
pub(crate) struct Turns<K: Ord>(Mutex<BTreeMap<K, Weak<tokio::sync::Mutex<()>>>>);

/// Lasts until it is dropped.
pub(crate) type Turn = OwnedMutexGuard<()>;

impl<K: Ord> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Ord> Turns<K> {
    /// Waits for its turn, in the order of the calls.
    pub(crate) async fn take(&self, name: K) -> Turn {
        let turn = {
            let mut turns = self.0.lock();
            // Bounded by what is under way.
            turns.retain(|_, turn| turn.strong_count() > 0);
            match turns.get(&name).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::new(tokio::sync::Mutex::new(()));
                    turns.insert(name, Arc::downgrade(&turn));
                    turn
                }
            }
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn one_name_waits_and_others_do_not() {
        let turns = Turns::default();
        let first = turns.take(1).now_or_never().expect("nobody is before it");
        assert!(turns.take(1).now_or_never().is_none());
        let other = turns.take(2).now_or_never().expect("another thing");
        drop(first);
        let second = turns.take(1).now_or_never().expect("its turn has come");
        assert_eq!(turns.0.lock().len(), 2);
        drop((second, other));
        drop(turns.take(3).now_or_never());
        assert!(turns.0.lock().len() <= 1, "what is over is forgotten");
    }
}
