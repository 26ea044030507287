//! Owns where one request's time went: its steps, in order, for the log of slow requests. Decides
//! nothing.

use std::fmt;
use std::time::Duration;

use coracle_proto::shard_map::NodeId;

/// Steps that are kept: the last of a request that tried many times tell what it hung on.
const KEPT_MAX: usize = 12;

/// What a request spent time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A write waited in its shard's queue.
    Queue,
    /// Its entry was synced by a majority, and applied.
    Replicate,
    /// The state was read, once the replica was known to be fresh enough.
    Read,
    /// This node tried, and could not.
    Tried,
    /// Another node had it.
    Forward(NodeId),
    /// Between two attempts.
    Pause,
}

/// The steps of one request.
#[derive(Default)]
pub(crate) struct Steps {
    steps: Vec<(Step, Duration)>,
    dropped: usize,
}

impl Steps {
    /// A step has ended.
    pub(crate) fn add(&mut self, step: Step, took: Duration) {
        if self.steps.len() == KEPT_MAX {
            self.steps.remove(0);
            self.dropped += 1;
        }
        self.steps.push((step, took));
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.dropped > 0 {
            write!(f, "{} earlier, ", self.dropped)?;
        }
        for (at, (step, took)) in self.steps.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            let ms = took.as_secs_f64() * 1e3;
            match step {
                Step::Queue => write!(f, "{comma}queue {ms:.1} ms")?,
                Step::Replicate => write!(f, "{comma}replicate {ms:.1} ms")?,
                Step::Read => write!(f, "{comma}read {ms:.1} ms")?,
                Step::Tried => write!(f, "{comma}tried {ms:.1} ms")?,
                Step::Forward(node) => write!(f, "{comma}forwarded to n{node} {ms:.1} ms")?,
                Step::Pause => write!(f, "{comma}pause {ms:.1} ms")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_steps_are_told_in_order() {
        let mut steps = Steps::default();
        steps.add(Step::Forward(NodeId(3)), Duration::from_micros(2_500));
        steps.add(Step::Queue, Duration::from_millis(1));
        assert_eq!(steps.to_string(), "forwarded to n3 2.5 ms, queue 1.0 ms");
        for _ in 0..KEPT_MAX {
            steps.add(Step::Pause, Duration::from_millis(20));
        }
        let text = steps.to_string();
        assert!(text.starts_with("2 earlier, pause 20.0 ms, pause"), "{text}");
    }
}
