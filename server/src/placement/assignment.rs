//! Items on nodes, and what a placement costs: the one definition of *better* that plans go by.
//!
//! An item (a shard) wants some seats on distinct nodes. What a change costs is one number whose parts
//! stand in the order of their importance ([`Assignment::cost`]): zones, then balance, then moves; with
//! [`Goal::Repair`] moves come first. Seats that are lacking rank above all of it: they are filled first.
//! Owns costs, seats and rooms. Does not search (see [`super::flow`]).
//!
//! - Zones: pairs of an item's seats that share a zone. The fewest pairs is the most zones, and as even
//!   in them as can be.
//! - Balance: first, seats of a node below its share rounded down, or above its share rounded up. Then
//!   the sum over nodes of seats² ÷ weight, which is least when seats are as the weights. Its steps, one
//!   more seat at a time, only grow: the problem is a minimum-cost flow.
//! - Moves: seats on nodes that did not have one at first.

use super::model::Goal;

/// A step of balance: `(2k + 1) × 2³² ÷ weight`, rounded down. Weights have 16 bits, so that no two steps
/// that differ are rounded to the same.
const STEP_SHIFT: u32 = 32;
/// A seat outside of a node's rounded share outweighs every step of balance inside.
const OUTSIDE: i128 = 1 << 55;
/// Moves of a way through all nodes are far fewer than this: room for the part of lower rank.
const MOVES_BITS: u32 = 24;
/// Sums of balance along any way that a search looks at stay within so many bits.
const BALANCE_BITS: u32 = 72;
/// Pairs in zones, along any such way.
const ZONES_BITS: u32 = 24;

/// A node, by its place in a list.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Number of its zone.
    pub(super) zone: usize,
    /// At least 1.
    pub(super) weight: u64,
    /// Whether seats come and go here at all.
    pub(super) open: bool,
    /// Its disk; `None` without a limit.
    pub(super) disk: Option<Fill>,
    /// Seats that are here whatever happens.
    pub(super) base: u64,
}

/// How full a disk is, and how full it may get.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fill {
    pub(super) used: u64,
    pub(super) limit: u64,
}

impl Fill {
    /// Whether so much may come, before anything leaves.
    pub(super) fn fits(self, bytes: u64) -> bool {
        self.used.saturating_add(bytes) <= self.limit
    }

    pub(super) fn add(&mut self, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
    }

    pub(super) fn remove(&mut self, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
    }
}

/// A shard, and where its seats are.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// Seats beside those that are pinned.
    pub(super) want: usize,
    /// Where it had seats at first, on open nodes.
    pub(super) home: Vec<usize>,
    /// Seats on nodes that are not open: they stay, and count for zones.
    pub(super) pinned: Vec<usize>,
    /// Which nodes it may have seats on; open ones.
    pub(super) may: Vec<bool>,
    /// What a seat takes.
    pub(super) bytes: u64,
    /// What it gives to do.
    pub(super) load: u64,
    /// Where it has seats, beside the pinned ones.
    pub(super) on: Vec<usize>,
}

/// Items on nodes.
pub(super) struct Assignment {
    pub(super) nodes: Vec<Place>,
    pub(super) items: Vec<Item>,
    /// Seats of each node.
    pub(super) count: Vec<u64>,
    /// Bytes on each node, of items.
    pub(super) bytes: Vec<u64>,
    /// Load of each node, of items.
    pub(super) load: Vec<u64>,
    /// Each node's share of all seats, rounded down and up.
    share: Vec<(u64, u64)>,
    goal: Goal,
    /// Whether seats of an item avoid each other's zones.
    spread: bool,
    /// Whether an item found a node without room for it.
    pub(super) refused: bool,
}

impl Assignment {
    /// Puts every item where it was, as far as it may stay there and wants to.
    pub(super) fn new(nodes: Vec<Place>, items: Vec<Item>, goal: Goal, spread: bool) -> Assignment {
        let seats: u64 = items.iter().map(|item| item.want as u64).sum();
        let open = || nodes.iter().filter(|node| node.open);
        let seats = seats + open().map(|node| node.base).sum::<u64>();
        let weights: u64 = open().map(|node| node.weight).sum::<u64>().max(1);
        let share = |node: &Place| match node.open {
            true => (seats * node.weight / weights, (seats * node.weight).div_ceil(weights)),
            false => (0, 0),
        };
        let mut made = Assignment {
            count: nodes.iter().map(|node| node.base).collect(),
            bytes: vec![0; nodes.len()],
            load: vec![0; nodes.len()],
            share: nodes.iter().map(share).collect(),
            nodes,
            items,
            goal,
            spread,
            refused: false,
        };
        for item in 0..made.items.len() {
            for node in made.items[item].home.clone() {
                made.items[item].on.push(node);
                made.count[node] += 1;
                made.bytes[node] += made.items[item].bytes;
                made.load[node] += made.items[item].load;
            }
            while made.items[item].on.len() > made.items[item].want {
                let on = made.items[item].on.clone();
                let least = on.into_iter().min_by_key(|node| (made.seat_cost(item, *node), *node));
                made.remove(item, least.expect("it has more seats than it wants"));
            }
        }
        made
    }

    /// One cost out of its parts, by their rank.
    fn cost(&self, zones: i64, balance: i128, moves: i64) -> i128 {
        let (zones, moves) = (i128::from(zones), i128::from(moves));
        match self.goal {
            Goal::Balance => {
                (zones << (BALANCE_BITS + MOVES_BITS)) + (balance << MOVES_BITS) + moves
            }
            Goal::Repair => {
                (moves << (BALANCE_BITS + ZONES_BITS)) + (zones << BALANCE_BITS) + balance
            }
        }
    }

    /// A cost of [`Goal::Balance`] without its moves. Keeps order: what is not above stays not above.
    pub(super) fn without_moves(cost: i128) -> i128 {
        (cost + (1 << (MOVES_BITS - 1))) >> MOVES_BITS
    }

    /// What the seat after `seats` adds to a node's balance. Only grows with `seats`.
    fn step(&self, node: usize, seats: u64) -> i128 {
        let (floor, ceil) = self.share[node];
        let step = (i128::from(2 * seats + 1) << STEP_SHIFT) / i128::from(self.nodes[node].weight);
        match seats {
            below if below < floor => step - OUTSIDE,
            above if above >= ceil => step + OUTSIDE,
            _ => step,
        }
    }

    /// What one seat more costs a node, as far as balance goes.
    pub(super) fn up(&self, node: usize) -> i128 {
        self.cost(0, self.step(node, self.count[node]), 0)
    }

    /// What one seat less costs a node: less than nothing. It must have one.
    pub(super) fn down(&self, node: usize) -> i128 {
        self.cost(0, -self.step(node, self.count[node] - 1), 0)
    }

    fn in_zone(&self, item: usize, zone: usize) -> i64 {
        let item = &self.items[item];
        let seats = item.on.iter().chain(&item.pinned);
        seats.filter(|node| self.nodes[**node].zone == zone).count() as i64
    }

    fn is_new(&self, item: usize, node: usize) -> i64 {
        i64::from(!self.items[item].home.contains(&node))
    }

    /// How zones and moves of an item change when a seat goes from `a` to `b`. Both are small.
    pub(super) fn change(&self, item: usize, a: usize, b: usize) -> (i64, i64) {
        let (from, to) = (self.nodes[a].zone, self.nodes[b].zone);
        let zones = match self.spread && from != to {
            true => self.in_zone(item, to) - self.in_zone(item, from) + 1,
            false => 0,
        };
        (zones, self.is_new(item, b) - self.is_new(item, a))
    }

    /// The cost of a seat that goes from `a` to `b`, without the nodes' balance.
    pub(super) fn exchange(&self, item: usize, a: usize, b: usize) -> i128 {
        let (zones, moves) = self.change(item, a, b);
        self.cost(zones, 0, moves)
    }

    /// Rank of an exchange among others, the best first; fits into 16 bits.
    pub(super) fn rank(&self, item: usize, a: usize, b: usize) -> u64 {
        let (zones, moves) = self.change(item, a, b);
        let (zones, moves) = ((zones + 100) as u64, (moves + 1) as u64);
        match self.goal {
            Goal::Balance => zones << 2 | moves,
            Goal::Repair => moves << 8 | zones,
        }
    }

    /// Whether a seat of the item may come to the node, by itself: nothing leaves the node first.
    pub(super) fn admits(&self, item: usize, node: usize) -> bool {
        self.items[item].may[node] && !self.items[item].on.contains(&node)
    }

    /// Whether the node's disk has room for it.
    pub(super) fn fits(&self, item: usize, node: usize) -> bool {
        self.nodes[node].disk.is_none_or(|disk| disk.fits(self.items[item].bytes))
    }

    /// What ending a seat costs; negative where it is good.
    fn seat_cost(&self, item: usize, node: usize) -> i128 {
        let zones = match self.spread {
            true => 1 - self.in_zone(item, self.nodes[node].zone),
            false => 0,
        };
        let balance = -self.step(node, self.count[node] - 1);
        self.cost(zones, balance, -self.is_new(item, node))
    }

    /// Fills lacking seats, each where it costs the least; bytes and partners decide between equals. True when any
    /// was. What is as good as can be comes of [`super::flow`].
    pub(super) fn fill(&mut self) -> bool {
        let mut order: Vec<usize> = (0..self.items.len()).collect();
        order.retain(|item| self.items[*item].on.len() < self.items[*item].want);
        // The largest first: small ones find room later.
        order.sort_by_key(|item| (std::cmp::Reverse(self.items[*item].bytes), *item));
        let mut together = self.together();
        let mut filled = false;
        for item in order {
            while self.items[item].on.len() < self.items[item].want {
                let admit: Vec<usize> =
                    (0..self.nodes.len()).filter(|node| self.admits(item, *node)).collect();
                let free = admit.iter().copied().filter(|node| self.fits(item, *node));
                let cost = |node: &usize| {
                    let zones = match self.spread {
                        true => self.in_zone(item, self.nodes[*node].zone),
                        false => 0,
                    };
                    let balance = self.step(*node, self.count[*node]);
                    let share = u128::from(self.bytes[*node]) << 16;
                    let share = share / u128::from(self.nodes[*node].weight);
                    // With many partners a lost node is replaced from many, and to many.
                    let others = self.items[item].on.iter();
                    let met: u32 = others.map(|other| together[*other][*node]).sum();
                    (self.cost(zones, balance, self.is_new(item, *node)), share, met, *node)
                };
                let Some(node) = free.min_by_key(cost) else {
                    self.refused |= !admit.is_empty();
                    break;
                };
                for other in &self.items[item].on {
                    together[*other][node] += 1;
                    together[node][*other] += 1;
                }
                self.add(item, node);
                filled = true;
            }
        }
        filled
    }

    /// How many items each pair of nodes shares.
    fn together(&self) -> Vec<Vec<u32>> {
        let mut together = vec![vec![0; self.nodes.len()]; self.nodes.len()];
        for item in &self.items {
            for (at, a) in item.on.iter().enumerate() {
                for b in &item.on[..at] {
                    together[*a][*b] += 1;
                    together[*b][*a] += 1;
                }
            }
        }
        together
    }

    /// Adds a seat.
    pub(super) fn add(&mut self, item: usize, node: usize) {
        let bytes = self.items[item].bytes;
        self.items[item].on.push(node);
        self.count[node] += 1;
        self.bytes[node] += bytes;
        self.load[node] += self.items[item].load;
        self.nodes[node].disk.iter_mut().for_each(|disk| disk.add(bytes));
    }

    /// Ends a seat.
    pub(super) fn remove(&mut self, item: usize, node: usize) {
        let bytes = self.items[item].bytes;
        self.items[item].on.retain(|on| *on != node);
        self.count[node] -= 1;
        self.bytes[node] -= bytes;
        self.load[node] -= self.items[item].load;
        self.nodes[node].disk.iter_mut().for_each(|disk| disk.remove(bytes));
    }

    /// A seat goes from `a` to `b`.
    pub(super) fn exchange_seat(&mut self, item: usize, a: usize, b: usize) {
        self.add(item, b);
        self.remove(item, a);
    }

    /// Seats that are new.
    pub(super) fn moved(&self) -> usize {
        let news = |item: &Item| item.on.iter().filter(|node| !item.home.contains(node)).count();
        self.items.iter().map(news).sum()
    }
}
