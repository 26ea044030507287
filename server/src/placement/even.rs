//! An even share of bytes: replicas that change places, so that counts stay as they are.
//!
//! Owns the second half of balance, which has no exact answer (it is bin packing). What costs no more
//! moves is done wherever it helps. Moves for nothing but bytes are made only while the fullest node is
//! beyond its share by the settings' slack, and until nothing found helps it: both are told by the
//! placement alone, so that a plan which was carried out leaves nothing to do.

use super::assignment::Assignment;
use super::model::{Goal, Settings};

/// Partners of the size nearest to what would be ideal that are tried for each replica.
const NEAR: usize = 8;
/// Improvements that cost nothing, in one plan: the last are small, and each takes a look at everything.
const FREE_MAX: usize = 128;
/// They end when the fullest node is as near to its share as this part of the slack.
const FREE_PART: u32 = 4;

/// A seat goes from `a` to `b`, and maybe another one back.
struct Swap {
    there: usize,
    back: Option<usize>,
    b: usize,
    moves: i64,
    /// Of the sum over nodes of bytes² ÷ weight; below zero.
    gain: i128,
}

/// Evens bytes out.
pub(super) fn even_out(assignment: &mut Assignment, settings: &Settings) {
    let mut free = 0;
    while let Some(a) = fullest(assignment) {
        let (slack, gap) = (settings.bytes_slack, settings.bytes_gap);
        let beyond = settings.goal == Goal::Balance && is_beyond(assignment, a, slack, gap);
        free += usize::from(!beyond);
        // Nearly even is even enough: the rest would be many small steps.
        if free > FREE_MAX || !is_beyond(assignment, a, slack / FREE_PART, 0) {
            return;
        }
        let Some(swap) = best_swap(assignment, a, beyond) else { return };
        assignment.exchange_seat(swap.there, a, swap.b);
        if let Some(back) = swap.back {
            assignment.exchange_seat(back, swap.b, a);
        }
    }
}

fn open(assignment: &Assignment) -> impl Iterator<Item = usize> {
    (0..assignment.nodes.len()).filter(|node| assignment.nodes[*node].open)
}

/// Bytes beside weight, as a number that can be compared.
fn fullness(assignment: &Assignment, node: usize) -> u128 {
    (u128::from(assignment.bytes[node]) << 16) / u128::from(assignment.nodes[node].weight)
}

fn fullest(assignment: &Assignment) -> Option<usize> {
    open(assignment).max_by_key(|node| (fullness(assignment, *node), std::cmp::Reverse(*node)))
}

/// Whether a node has more than its share by a slack, in thousandths, and by so many bytes.
fn is_beyond(assignment: &Assignment, node: usize, slack: u32, gap: u64) -> bool {
    let all: u128 = open(assignment).map(|node| u128::from(assignment.bytes[node])).sum();
    let weights: u64 = open(assignment).map(|node| assignment.nodes[node].weight).sum();
    let share = all * u128::from(assignment.nodes[node].weight) / u128::from(weights.max(1));
    let slack = share * u128::from(slack) / 1_000;
    u128::from(assignment.bytes[node]) > share + slack.max(u128::from(gap))
}

/// The best of what takes bytes off `a`: the fewest moves, then the most gain.
fn best_swap(assignment: &Assignment, a: usize, paid: bool) -> Option<Swap> {
    let mut seats: Vec<Vec<usize>> = vec![Vec::new(); assignment.nodes.len()];
    for (at, item) in assignment.items.iter().enumerate() {
        item.on.iter().for_each(|node| seats[*node].push(at));
    }
    for list in &mut seats {
        list.sort_by_key(|item| (assignment.items[*item].bytes, *item));
    }
    let mut best: Option<Swap> = None;
    let mut consider = |swap: Swap| {
        let allowed = swap.gain < 0 && (paid || swap.moves <= 0);
        let better = best
            .as_ref()
            .is_none_or(|best| (swap.moves.max(0), swap.gain) < (best.moves.max(0), best.gain));
        if allowed && better {
            best = Some(swap);
        }
    };
    for b in open(assignment).filter(|b| fullness(assignment, *b) < fullness(assignment, a)) {
        let news = seats[b].iter().copied().filter(|item| is_new(assignment, *item, b));
        let news: Vec<usize> = news.collect();
        for there in seats[a].iter().copied().filter(|item| comes(assignment, *item, b)) {
            shift(assignment, there, a, b).into_iter().for_each(&mut consider);
            near(assignment, there, a, b, &news).for_each(&mut consider);
            if paid || is_new(assignment, there, a) {
                near(assignment, there, a, b, &seats[b]).for_each(&mut consider);
            }
        }
    }
    best
}

fn is_new(assignment: &Assignment, item: usize, node: usize) -> bool {
    !assignment.items[item].home.contains(&node)
}

fn comes(assignment: &Assignment, item: usize, node: usize) -> bool {
    assignment.admits(item, node) && assignment.fits(item, node)
}

/// One seat alone, where counts are as good either way.
fn shift(assignment: &Assignment, there: usize, a: usize, b: usize) -> Option<Swap> {
    let (zones, moves) = assignment.change(there, a, b);
    if zones != 0 || assignment.up(b) + assignment.down(a) != 0 {
        return None;
    }
    let gain = gain(assignment, a, b, i128::from(assignment.items[there].bytes));
    Some(Swap { there, back: None, b, moves, gain })
}

/// Swaps of an item on `a` with some on `b`, out of a list that is sorted by bytes.
fn near<'a>(
    assignment: &'a Assignment,
    there: usize,
    a: usize,
    b: usize,
    list: &'a [usize],
) -> impl Iterator<Item = Swap> + 'a {
    let bytes = |item: usize| i128::from(assignment.items[item].bytes);
    let weight = |node: usize| i128::from(assignment.nodes[node].weight);
    let on = |node: usize| i128::from(assignment.bytes[node]);
    // What would have to go from `a` to `b` for both to be as full.
    let ideal = (on(a) * weight(b) - on(b) * weight(a)) / (weight(a) + weight(b));
    let wanted = bytes(there) - ideal;
    let at = list.partition_point(|item| bytes(*item) < wanted);
    let (from, to) = (at.saturating_sub(NEAR / 2), (at + NEAR / 2).min(list.len()));
    list[from..to].iter().copied().filter_map(move |back| {
        let (zones, moves) = assignment.change(there, a, b);
        if back == there || !comes(assignment, back, a) {
            return None;
        }
        let (zones_back, moves_back) = assignment.change(back, b, a);
        let gain = gain(assignment, a, b, bytes(there) - bytes(back));
        let moves = moves + moves_back;
        (zones + zones_back == 0).then_some(Swap { there, back: Some(back), b, moves, gain })
    })
}

/// How the sum of bytes² ÷ weight changes when so many bytes go from `a` to `b`, times both weights.
fn gain(assignment: &Assignment, a: usize, b: usize, bytes: i128) -> i128 {
    let weight = |node: usize| i128::from(assignment.nodes[node].weight);
    let on = |node: usize| i128::from(assignment.bytes[node]);
    // Bytes in KiB: their squares then fit with room to spare.
    let (bytes, on_a, on_b) = (bytes >> 10, on(a) >> 10, on(b) >> 10);
    weight(b) * (bytes * bytes - 2 * on_a * bytes) + weight(a) * (bytes * bytes + 2 * on_b * bytes)
}
