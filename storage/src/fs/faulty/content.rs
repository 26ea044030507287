//! Owns what one file of the hostile twin holds: what is seen, what is durable, and the difference.
//! Does not know names or faults.

use std::collections::{BTreeMap, VecDeque};

use super::{Dice, Loss};

/// The unit in which a crash tears a write: no drive promises more.
const SECTOR: usize = 512;
const PAGE: u64 = 4096;

/// A file's bytes. Sparse: pages that were never written take no memory.
#[derive(Clone, Default)]
struct Content {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

#[derive(Clone)]
enum Pending {
    Write(u64, Box<[u8]>),
    Len(u64),
}

/// One file: two views and, in order, what lies between them.
#[derive(Clone, Default)]
pub(super) struct Inode {
    seen: Content,
    durable: Content,
    pending: VecDeque<Pending>,
}

impl Content {
    fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let len = (buf.len() as u64).min(self.len.saturating_sub(offset)) as usize;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (page, start) = (at / PAGE, (at % PAGE) as usize);
            let part = (PAGE as usize - start).min(len - done);
            let out = &mut buf[done..done + part];
            match self.pages.get(&page) {
                Some(bytes) => out.copy_from_slice(&bytes[start..start + part]),
                None => out.fill(0),
            }
            done += part;
        }
        len
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (page, start) = (at / PAGE, (at % PAGE) as usize);
            let part = (PAGE as usize - start).min(data.len() - done);
            let bytes =
                self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
            bytes[start..start + part].copy_from_slice(&data[done..done + part]);
            done += part;
        }
        self.len = self.len.max(offset + data.len() as u64);
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.pages.split_off(&len.div_ceil(PAGE));
            if let Some(last) = self.pages.get_mut(&(len / PAGE)) {
                last[(len % PAGE) as usize..].fill(0);
            }
        }
        self.len = len;
    }

    fn apply(&mut self, change: &Pending) {
        match change {
            Pending::Write(offset, data) => self.write(*offset, data),
            Pending::Len(len) => self.set_len(*len),
        }
    }
}

impl Inode {
    pub(super) fn len(&self) -> u64 {
        self.seen.len
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        self.seen.read(buf, offset)
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        self.seen.write(offset, data);
        self.pending.push_back(Pending::Write(offset, data.into()));
    }

    pub(super) fn set_len(&mut self, len: u64) {
        self.seen.set_len(len);
        self.pending.push_back(Pending::Len(len));
    }

    pub(super) fn sync(&mut self) {
        for change in self.pending.drain(..) {
            self.durable.apply(&change);
        }
    }

    /// After a failed sync: the kernel takes the pages for clean, though they never reached the
    /// disk.
    pub(super) fn forget_pending(&mut self) {
        self.pending.clear();
    }

    pub(super) fn flip_bit(&mut self, offset: u64, bit: u8) {
        for content in [&mut self.seen, &mut self.durable] {
            let mut byte = [0];
            if content.read(&mut byte, offset) == 1 {
                content.write(offset, &[byte[0] ^ (1 << bit)]);
            }
        }
    }

    /// The file as the machine's restart finds it.
    pub(super) fn after_crash(&self, loss: Loss, dice: &mut Dice) -> Inode {
        let mut left = self.durable.clone();
        match loss {
            Loss::All => {}
            Loss::Nothing => unreachable!("a kill of the process leaves the files as they are"),
            Loss::Subset => {
                for change in &self.pending {
                    match (dice.below(3), change) {
                        (0, _) => {}
                        (1, _) | (_, Pending::Len(_)) => left.apply(change),
                        (_, Pending::Write(offset, data)) => tear(&mut left, *offset, data, dice),
                    }
                }
            }
        }
        Inode { seen: left.clone(), durable: left, pending: VecDeque::new() }
    }
}

/// Keeps some of a write's sectors. Sectors are those of the file, not of the write.
fn tear(left: &mut Content, offset: u64, data: &[u8], dice: &mut Dice) {
    let mut start = 0;
    while start < data.len() {
        let at = offset + start as u64;
        let part = (SECTOR - at as usize % SECTOR).min(data.len() - start);
        if dice.one_in(2) {
            left.write(at, &data[start..start + part]);
        }
        start += part;
    }
}
