//! The connections that members dialled and that stand: at most one for each node and lane.
//!
//! Owns letting their questions through until another takes their place. Does no I/O.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_raft::types::NodeId;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::frame::Broken;
use super::message::Connection;

/// Lets a connection's questions through until it is closed. Why a lock and not only a token: when a
/// newer connection begins, not one question of the older may come after it.
pub(crate) struct Gate {
    start_count: u64,
    open: Mutex<bool>,
    pub(crate) closed: CancellationToken,
}

impl Gate {
    /// Runs `pass` if the gate is open; it is not closed meanwhile.
    pub(crate) fn pass(&self, pass: impl FnOnce()) -> Result<(), Broken> {
        let open = self.open.lock();
        if !*open {
            return Err(Broken::Replaced);
        }
        pass();
        Ok(())
    }

    fn close(&self) {
        *self.open.lock() = false;
        self.closed.cancel();
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Gates(Mutex<BTreeMap<(NodeId, Connection), Arc<Gate>>>);

impl Gates {
    /// Gives a connection its place. An older one of the same lane is closed before this returns.
    pub(crate) fn enter(
        &self,
        node: NodeId,
        lane: Connection,
        start_count: u64,
        ended: &CancellationToken,
    ) -> Entered<'_> {
        let gate =
            Arc::new(Gate { start_count, open: Mutex::new(true), closed: ended.child_token() });
        let replaced = self.0.lock().insert((node, lane), gate.clone());
        if let Some(replaced) = replaced {
            replaced.close();
        }
        Entered { gates: self, node, lane, gate }
    }

    /// The lanes on which a node is connected.
    pub(crate) fn of(&self, node: NodeId) -> Vec<Connection> {
        let gates = self.0.lock();
        Connection::ALL.into_iter().filter(|lane| gates.contains_key(&(node, *lane))).collect()
    }

    /// Closes the connections of a node's starts before `start_count`.
    pub(crate) fn close(&self, node: NodeId, start_count: u64) {
        let closing: Vec<_> = {
            let gates = self.0.lock();
            let of_lane = |lane| gates.get(&(node, lane)).cloned();
            let gates = Connection::ALL.into_iter().filter_map(of_lane);
            gates.filter(|gate| gate.start_count < start_count).collect()
        };
        // Without the map's lock: a gate is waited for while questions pass.
        for gate in closing {
            gate.close();
        }
    }
}

/// A connection's place; given up when dropped.
pub(crate) struct Entered<'a> {
    gates: &'a Gates,
    node: NodeId,
    lane: Connection,
    pub(crate) gate: Arc<Gate>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut gates = self.gates.0.lock();
        let key = (self.node, self.lane);
        if gates.get(&key).is_some_and(|gate| Arc::ptr_eq(gate, &self.gate)) {
            gates.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_a_newer_connection_has_its_place_the_older_one_passes_nothing() {
        let (gates, ended) = (Gates::default(), CancellationToken::new());
        let enter = |lane, start_count| gates.enter(NodeId(2), lane, start_count, &ended);
        let older = enter(Connection::Appends, 5);
        let other_lane = enter(Connection::Control, 5);
        assert!(older.gate.pass(|| {}).is_ok());
        let newer = enter(Connection::Appends, 5);
        let late = older.gate.pass(|| panic!("a late question came through"));
        assert!(matches!(late, Err(Broken::Replaced)) && older.gate.closed.is_cancelled());
        assert!(newer.gate.pass(|| {}).is_ok() && other_lane.gate.pass(|| {}).is_ok());

        drop(older);
        assert_eq!(gates.of(NodeId(2)), [Connection::Control, Connection::Appends]);
        gates.close(NodeId(2), 5);
        assert!(newer.gate.pass(|| {}).is_ok(), "this start stays");
        gates.close(NodeId(2), 6);
        assert!(newer.gate.closed.is_cancelled() && other_lane.gate.closed.is_cancelled());
        drop((newer, other_lane));
        assert!(gates.of(NodeId(2)).is_empty());
    }
}
