//! Owns the batch: the unit that a store writes atomically. Does not know what the keys mean.

use bytes::Bytes;

/// One step of a batch.
#[derive(Clone, Eq, PartialEq, Debug)]
pub enum BatchOp {
    /// Sets a key to a value.
    Put(Bytes, Bytes),
    /// Removes a key; a key that is not there is no error.
    Delete(Bytes),
    /// Removes every key from the first (included) to the second (excluded).
    DeleteRange(Bytes, Bytes),
}

/// Steps that are written together or not at all, in this order: of two steps on one key the later
/// holds.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct Batch {
    /// The steps.
    pub ops: Vec<BatchOp>,
}

impl Batch {
    /// A batch without steps.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Adds a put.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.ops.push(BatchOp::Put(key.into(), value.into()));
    }

    /// Adds a delete.
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.ops.push(BatchOp::Delete(key.into()));
    }

    /// Adds a delete of the keys `from..to`.
    pub fn delete_range(&mut self, from: impl Into<Bytes>, to: impl Into<Bytes>) {
        self.ops.push(BatchOp::DeleteRange(from.into(), to.into()));
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values, without overhead.
    pub fn bytes(&self) -> u64 {
        let of_op = |op: &BatchOp| match op {
            BatchOp::Put(key, value) => key.len() + value.len(),
            BatchOp::Delete(key) => key.len(),
            BatchOp::DeleteRange(from, to) => from.len() + to.len(),
        };
        self.ops.iter().map(|op| of_op(op) as u64).sum()
    }
}
