//! An even share of bytes, then of load: replicas that change places, so that counts stay as they are.
//!
//! Owns the second half of balance, which has no exact answer (it is bin packing). What costs no more
//! moves is done wherever it helps. Moves for nothing else are made only while the fullest node is beyond
//! its share by the settings' slack, and until nothing found helps it: both are told by the placement
//! alone, so that a plan which was carried out leaves nothing to do. Load comes second: no exchange for it
//! takes a node beyond its share of bytes.

use super::assignment::Assignment;
use super::model::{Goal, Settings};

/// Partners of the size nearest to what would be ideal that are tried for each replica.
const NEAR: usize = 8;
/// Improvements that cost nothing, in one plan: the last are small, and each takes a look at everything.
const FREE_MAX: usize = 128;
/// They end when the fullest node is as near to its share as this part of the slack.
const FREE_PART: u32 = 4;
/// Loads waver more than bytes, and leaders, which cost no copies, even them out first: replicas move
/// beyond so many times the slack of leaders.
const LOAD_SLACKS: u32 = 3;

/// What is evened out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Bytes,
    Load,
}

/// How far above its share a node may be: in thousandths of it, and in units of what is evened out.
#[derive(Clone, Copy)]
struct Slack {
    part: u32,
    gap: u64,
}

/// A seat goes from `a` to `b`, and maybe another one back.
struct Swap {
    there: usize,
    back: Option<usize>,
    b: usize,
    moves: i64,
    /// Of the sum over nodes of (bytes or load)² ÷ weight; below zero.
    gain: i128,
}

/// Evens bytes out, then load.
pub(super) fn even_out(assignment: &mut Assignment, settings: &Settings) {
    let bytes = Slack { part: settings.bytes_slack, gap: settings.bytes_gap };
    Even { assignment, by: By::Bytes, bytes }.run(settings.goal, bytes);
    let loads: u128 = assignment.items.iter().map(|item| u128::from(item.load)).sum();
    let even = Even { assignment, by: By::Load, bytes };
    let bytes_are_even = open(even.assignment)
        .all(|node| !beyond(even.assignment, By::Bytes, node, even.assignment.bytes[node], bytes));
    // Else the next plan would take the bytes up again.
    if bytes_are_even && loads > u128::from(settings.load_gap) {
        let load = Slack { part: settings.load_slack * LOAD_SLACKS, gap: settings.load_gap };
        even.run(settings.goal, load);
    }
}

struct Even<'a> {
    assignment: &'a mut Assignment,
    by: By,
    /// What holds for bytes whatever is evened out.
    bytes: Slack,
}

impl Even<'_> {
    fn run(self, goal: Goal, slack: Slack) {
        let mut free = 0;
        while let Some(a) = self.fullest() {
            let is_beyond = goal == Goal::Balance && self.is_beyond(a, slack);
            free += usize::from(!is_beyond);
            // Nearly even is even enough: the rest would be many small steps.
            let little = Slack { part: slack.part / FREE_PART, gap: 0 };
            if free > FREE_MAX || !self.is_beyond(a, little) {
                return;
            }
            let Some(swap) = self.best_swap(a, is_beyond) else { return };
            self.assignment.exchange_seat(swap.there, a, swap.b);
            if let Some(back) = swap.back {
                self.assignment.exchange_seat(back, swap.b, a);
            }
        }
    }

    /// What an item takes of what is evened out.
    fn size(&self, item: usize) -> u64 {
        let item = &self.assignment.items[item];
        if self.by == By::Bytes { item.bytes } else { item.load }
    }

    fn on(&self, node: usize) -> u64 {
        on(self.assignment, self.by, node)
    }

    /// What it has beside its weight, as a number that can be compared.
    fn fullness(&self, node: usize) -> u128 {
        (u128::from(self.on(node)) << 16) / u128::from(self.assignment.nodes[node].weight)
    }

    fn fullest(&self) -> Option<usize> {
        let key = |node: &usize| (self.fullness(*node), std::cmp::Reverse(*node));
        open(self.assignment).max_by_key(key)
    }

    /// Whether a node has more than its share by a slack.
    fn is_beyond(&self, node: usize, slack: Slack) -> bool {
        beyond(self.assignment, self.by, node, self.on(node), slack)
    }

    /// The best of what takes something off `a`: the fewest moves, then the most gain.
    fn best_swap(&self, a: usize, paid: bool) -> Option<Swap> {
        let assignment = &*self.assignment;
        let mut seats: Vec<Vec<usize>> = vec![Vec::new(); assignment.nodes.len()];
        for (at, item) in assignment.items.iter().enumerate() {
            item.on.iter().for_each(|node| seats[*node].push(at));
        }
        for list in &mut seats {
            list.sort_by_key(|item| (self.size(*item), *item));
        }
        let mut best: Option<Swap> = None;
        let mut consider = |swap: Swap| {
            let allowed = swap.gain < 0 && (paid || swap.moves <= 0) && self.keeps_bytes(a, &swap);
            let better = best
                .as_ref()
                .is_none_or(|best| (swap.moves.max(0), swap.gain) < (best.moves.max(0), best.gain));
            if allowed && better {
                best = Some(swap);
            }
        };
        for b in open(assignment).filter(|b| self.fullness(*b) < self.fullness(a)) {
            let news = seats[b].iter().copied().filter(|item| is_new(assignment, *item, b));
            let news: Vec<usize> = news.collect();
            for there in seats[a].iter().copied().filter(|item| comes(assignment, *item, b)) {
                self.shift(there, a, b).into_iter().for_each(&mut consider);
                self.near(there, a, b, &news).for_each(&mut consider);
                if paid || is_new(assignment, there, a) {
                    self.near(there, a, b, &seats[b]).for_each(&mut consider);
                }
            }
        }
        best
    }

    /// Whether an exchange for load leaves both nodes within their shares of bytes.
    fn keeps_bytes(&self, a: usize, swap: &Swap) -> bool {
        if self.by == By::Bytes {
            return true;
        }
        let bytes = |item: usize| self.assignment.items[item].bytes;
        let (there, back) = (bytes(swap.there), swap.back.map_or(0, bytes));
        let after = |node: usize, comes: u64, goes: u64| {
            let on = self.assignment.bytes[node].saturating_add(comes).saturating_sub(goes);
            !beyond(self.assignment, By::Bytes, node, on, self.bytes)
        };
        after(a, back, there) && after(swap.b, there, back)
    }

    /// One seat alone, where counts are as good either way.
    fn shift(&self, there: usize, a: usize, b: usize) -> Option<Swap> {
        let (zones, moves) = self.assignment.change(there, a, b);
        if zones != 0 || self.assignment.up(b) + self.assignment.down(a) != 0 {
            return None;
        }
        let gain = self.gain(a, b, i128::from(self.size(there)));
        Some(Swap { there, back: None, b, moves, gain })
    }

    /// Swaps of an item on `a` with some on `b`, out of a list that is sorted by size.
    fn near<'a>(
        &'a self,
        there: usize,
        a: usize,
        b: usize,
        list: &'a [usize],
    ) -> impl Iterator<Item = Swap> + 'a {
        let assignment = &*self.assignment;
        let size = |item: usize| i128::from(self.size(item));
        let weight = |node: usize| i128::from(assignment.nodes[node].weight);
        let on = |node: usize| i128::from(self.on(node));
        // What would have to go from `a` to `b` for both to be as full.
        let ideal = (on(a) * weight(b) - on(b) * weight(a)) / (weight(a) + weight(b));
        let wanted = size(there) - ideal;
        let at = list.partition_point(|item| size(*item) < wanted);
        let (from, to) = (at.saturating_sub(NEAR / 2), (at + NEAR / 2).min(list.len()));
        list[from..to].iter().copied().filter_map(move |back| {
            let (zones, moves) = assignment.change(there, a, b);
            if back == there || !comes(assignment, back, a) {
                return None;
            }
            let (zones_back, moves_back) = assignment.change(back, b, a);
            let gain = self.gain(a, b, size(there) - size(back));
            let moves = moves + moves_back;
            (zones + zones_back == 0).then_some(Swap { there, back: Some(back), b, moves, gain })
        })
    }

    /// How the sum of size² ÷ weight changes when so much goes from `a` to `b`, times both weights.
    fn gain(&self, a: usize, b: usize, size: i128) -> i128 {
        let weight = |node: usize| i128::from(self.assignment.nodes[node].weight);
        let on = |node: usize| i128::from(self.on(node));
        // Bytes in KiB: their squares then fit with room to spare.
        let shift = if self.by == By::Bytes { 10 } else { 0 };
        let (size, on_a, on_b) = (size >> shift, on(a) >> shift, on(b) >> shift);
        weight(b) * (size * size - 2 * on_a * size) + weight(a) * (size * size + 2 * on_b * size)
    }
}

fn open(assignment: &Assignment) -> impl Iterator<Item = usize> {
    (0..assignment.nodes.len()).filter(|node| assignment.nodes[*node].open)
}

fn on(assignment: &Assignment, by: By, node: usize) -> u64 {
    if by == By::Bytes { assignment.bytes[node] } else { assignment.load[node] }
}

/// Whether a node that has so much has more than its share by a slack.
fn beyond(assignment: &Assignment, by: By, node: usize, has: u64, slack: Slack) -> bool {
    let all: u128 = open(assignment).map(|node| u128::from(on(assignment, by, node))).sum();
    let weights: u64 = open(assignment).map(|node| assignment.nodes[node].weight).sum();
    let share = all * u128::from(assignment.nodes[node].weight) / u128::from(weights.max(1));
    let part = share * u128::from(slack.part) / 1_000;
    u128::from(has) > share + part.max(u128::from(slack.gap))
}

fn is_new(assignment: &Assignment, item: usize, node: usize) -> bool {
    !assignment.items[item].home.contains(&node)
}

fn comes(assignment: &Assignment, item: usize, node: usize) -> bool {
    assignment.admits(item, node) && assignment.fits(item, node)
}
