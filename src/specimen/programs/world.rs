//! What runs a program: compiled code and the stubs, played on a [`Played`] stack and on the [`Endless`] one at once.

use super::asks::Ask;
use super::endless::{Endless, Level, REGISTERS, What, Word};
use super::{Op, Program, Tried};
use crate::abi::Extent;
use crate::codemap::FrameLayout;
use crate::pac::RawPc;
use crate::segment::write_word;
use crate::signer::Signer;
use crate::signer::model::Model;
use crate::specimen::HEAP;
use crate::stack::played::{ENTRIES, Played};
use crate::thread::Thread;

/// Most levels at once.
const LEVELS: usize = 80;

/// Both stacks, and the registers.
pub(super) struct World<'a> {
    pub(super) program: &'a Program,
    pub(super) played: Played<'a>,
    pub(super) endless: Endless,
    /// What the callee-saved registers should hold, and what they do. Where they lie is the block in which `grow` keeps them.
    pub(super) expected: [Word; REGISTERS],
    pub(super) registers: Box<[u64; REGISTERS]>,
    pub(super) segments: Vec<Extent>,
    noise: u64,
    pub tried: Tried,
}

impl<'a> World<'a> {
    /// An idle stack.
    pub fn new(program: &'a Program, thread: &'a Thread) -> Result<World<'a>, String> {
        let model = program.design.keys.map_or(Model::absent(), Model::new);
        let played = Played::new(thread, program.policy, model, program.shadow).map_err(|error| error.to_string())?;
        let endless = Endless { model, levels: vec![], tops: vec![] };
        let mut world = World {
            program,
            played,
            endless,
            expected: [Word::Data(HEAP); REGISTERS],
            registers: Box::new([HEAP; REGISTERS]),
            segments: vec![],
            noise: program.design.contents,
            tried: Tried::default(),
        };
        world.look();
        Ok(world)
    }

    /// Whether nothing is on the stack.
    pub fn is_idle(&self) -> bool {
        self.endless.levels.is_empty()
    }

    /// Does one thing, and compares the two stacks.
    pub fn step(&mut self, op: &Op) -> Result<(), String> {
        self.noise ^= op.noise;
        let deep = self.endless.levels.len() >= LEVELS;
        let enters = !deep && self.played.entries() < ENTRIES;
        match self.endless.levels.last() {
            None => self.enter(op)?,
            Some(level) if level.is_managed() => match op.kind {
                0..=8 if !deep => self.call(op)?,
                9 => self.tail_call(op)?,
                10..=11 => self.grow(op.site, op.bytes)?,
                12..=13 if !deep => self.exit(op)?,
                14..=15 if !deep => self.link(op)?,
                _ => self.give_back()?,
            },
            Some(_) => {
                self.check_picture()?;
                match op.kind {
                    0..=8 if enters => self.enter(op)?,
                    9..=14 => self.ask(Ask::Reserve(op.bytes)).map(drop)?,
                    15..=17 => self.ask(Ask::Shrink(op.noise & 1 == 0)).map(drop)?,
                    _ => self.go_back()?,
                }
            }
        }
        self.compare()
    }

    /// Everything returns.
    pub fn finish(&mut self) -> Result<(), String> {
        while let Some(youngest) = self.endless.levels.last() {
            if youngest.is_managed() {
                self.give_back()?
            } else {
                self.go_back()?
            }
            self.compare()?;
        }
        Ok(())
    }

    fn compare(&self) -> Result<(), String> {
        self.endless.check()?;
        self.check_segments()?;
        for (index, (&word, &register)) in self.expected.iter().zip(&*self.registers).enumerate() {
            if self.endless.value(word) != register {
                return Err(format!("register {index} holds {register:#x} instead of {word:x?}"));
            }
        }
        let calls = self.endless.levels.iter().map(|level| level.returns.address() as u64);
        match calls.eq(self.played.shadow()) {
            true => Ok(()),
            false => Err("the shadow stack holds other return addresses".into()),
        }
    }

    /// Looks where the segments are.
    pub(super) fn look(&mut self) {
        self.segments = self.played.segments().collect();
        self.endless.tops = self.segments.iter().map(|segment| segment.top).collect();
    }

    pub(super) fn random(&mut self) -> u64 {
        self.noise = self.noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.noise ^ self.noise >> 29
    }

    /// A word that is no pointer. In frames where undeclared pointers are allowed some look like one, and must stay as they are.
    fn data(&mut self, layout: &FrameLayout) -> Word {
        let word = self.random();
        let stale = &self.segments[(word >> 40) as usize % self.segments.len()];
        let looks_like_one = !layout.conservative && word & 7 == 0;
        Word::Data(match looks_like_one {
            true => (stale.base + (word >> 8) as usize % (stale.top - stale.base)) as u64,
            false => word | HEAP,
        })
    }

    pub(super) fn youngest(&self) -> usize {
        self.endless.levels.len() - 1
    }

    pub(super) fn write(&self, level: usize, offset: i32) {
        let held = &self.endless.levels[level];
        let word = self.endless.value(held.words[held.index(offset)]);
        // SAFETY: a word of a frame, which `push` has seen to lie in its segment.
        unsafe { write_word(self.endless.record(level).wrapping_add_signed(offset as isize), word) };
    }

    /// Makes a level whose owned memory ends at `end`, and its record as its prologue does.
    pub(super) fn push(&mut self, end: usize, mut level: Level) -> Result<(), String> {
        let record = end - (level.layout.cfa_bytes + level.layout.incoming) as usize;
        let holds = |segment: &Extent| segment.holds(record, end - record);
        let Some(segment) = self.segments.iter().position(holds) else {
            return Err(format!("there is no segment at {record:#x}"));
        };
        if record - level.frame_bytes < self.segments[segment].base {
            return Err(format!("a frame at {record:#x} does not fit in the reserve"));
        }
        (level.segment, level.depth) = (segment, self.segments[segment].top - record);
        let words = (end - record + level.frame_bytes) / 8;
        level.words = (0..words).map(|_| self.data(&level.layout)).collect();
        for &(register, offset) in &level.saves {
            let index = level.index(offset);
            level.words[index] = self.expected[register.index()];
        }
        let (layout, saves) = (level.layout, level.saves.clone());
        self.played.push_shadow(level.returns);
        self.endless.levels.push(level);
        let index = self.youngest();
        for number in 0..words {
            let offset = self.endless.levels[index].offset(number);
            self.write(index, offset);
        }
        for (register, offset) in saves {
            // SAFETY: as in `write`.
            unsafe { write_word(record.wrapping_add_signed(offset as isize), self.registers[register.index()]) };
        }
        let (pointer, pc) = self.endless.made(index);
        // SAFETY: as in `write`.
        unsafe {
            write_word(record, pointer.word());
            write_word(record + layout.return_offset(), pc);
        }
        Ok(())
    }

    /// Pops the youngest level, by the shadow stack.
    pub(super) fn pop(&mut self) -> Result<Level, String> {
        let level = self.endless.levels.pop().ok_or("nothing to pop")?;
        match self.played.pop_shadow() == Some(level.returns) {
            true => Ok(level),
            false => Err(format!("the shadow stack has another return address than {:x?}", level.returns)),
        }
    }

    /// A stub's level, right below the youngest one.
    pub(super) fn push_stub(&mut self, what: What, below: usize, returns: RawPc) -> Result<usize, String> {
        let fp = Word::Place(self.youngest(), 0);
        let layout = FrameLayout::new(0, self.endless.model.stubs());
        let (segment, depth, frame_bytes) = (0, 0, 0);
        let (words, saves, named) = (vec![], vec![], vec![]);
        self.push(below, Level { what, layout, segment, depth, returns, fp, frame_bytes, words, saves, named })?;
        Ok(self.endless.record(self.youngest()))
    }

    /// A function's level; then it checks its stack pointer, as compiled code does.
    pub(super) fn begin(
        &mut self,
        op: &Op,
        function: usize,
        end: usize,
        returns: RawPc,
        fp: Word,
    ) -> Result<(), String> {
        let made = &self.program.design.functions[function];
        let layout = made.layout;
        let more = if layout.dynamic { op.noise as usize % 20 * 16 } else { 0 };
        let frame_bytes = layout.frame_bytes as usize + more;
        let what = What::Managed { function, more };
        let (segment, depth, words) = (0, 0, vec![]);
        let (saves, named) = (made.saves.clone(), vec![]);
        self.push(end, Level { what, layout, segment, depth, returns, fp, frame_bytes, words, saves, named })?;
        let index = self.youngest();
        let largest = made.sites.iter().filter_map(|site| site.frame_bytes).fold(layout.frame_bytes, u32::max);
        let lowest = |world: &World<'_>| world.endless.record(index) - largest as usize - more;
        if lowest(self) < self.played.limit() {
            self.grow(op.site, largest as usize)?;
            let there = self.endless.levels.len() > index;
            if there && lowest(self) < self.played.limit() && !self.program.policy.relocate_always {
                return Err("growth has made too little room".into());
            }
        }
        Ok(())
    }

    /// The youngest function is about to call from one of its sites: puts its frame in the form that it has there.
    pub(super) fn prepare(&mut self, site: usize) -> RawPc {
        let index = self.youngest();
        let mut level = self.endless.levels[index].clone();
        let What::Managed { function, more } = level.what else { unreachable!("a function calls") };
        let design = &self.program.design;
        let made = &design.functions[function];
        let site = site % made.sites.len();
        let (returns, site) = (design.returns_to(function, site), &made.sites[site]);
        let (before, owned) = (level.frame_bytes, level.words.len() * 8 - level.frame_bytes);
        level.frame_bytes = site.frame_bytes.unwrap_or(made.layout.frame_bytes) as usize + more;
        let low = self.endless.record(index) - level.frame_bytes;
        assert!(low >= self.segments[level.segment].base, "`begin` has seen to that");
        // What lay there stays, but for pointers that were declared for another call.
        let mut words: Vec<Word> = (0..(level.frame_bytes + owned) / 8).map(|_| self.data(&made.layout)).collect();
        let shared = before.min(level.frame_bytes) / 8 + owned / 8;
        let (from, to) = (level.words.len() - shared, words.len() - shared);
        for (number, &word) in level.words[from..].iter().enumerate() {
            let offset = (number as i32 * 8) - before.min(level.frame_bytes) as i32;
            let saved = level.saves.iter().any(|&(_, place)| place == offset);
            if saved || matches!(word, Word::Data(_)) {
                words[to + number] = word;
            }
        }
        level.words = words;
        for &offset in &site.slots {
            let number = level.index(offset);
            level.words[number] = self.pointer(index, &level);
        }
        for &(register, _) in &level.saves {
            let named = site.registers.contains(&register);
            let word = if named { self.pointer(index, &level) } else { Word::Data(self.random() | HEAP) };
            self.expected[register.index()] = word;
        }
        level.named = site.registers.clone();
        let (count, saves) = (level.words.len(), level.saves.clone());
        self.endless.levels[index] = level;
        for number in 0..count {
            let offset = self.endless.levels[index].offset(number);
            if !self.endless.levels[index].is_record(offset) {
                self.write(index, offset);
            }
        }
        for (register, _) in saves {
            self.registers[register.index()] = self.endless.value(self.expected[register.index()]);
        }
        returns
    }

    /// What the function at `index` puts in a slot for pointers: null, a pointer to the heap, into its own frame, or into an older one.
    fn pointer(&mut self, index: usize, own: &Level) -> Word {
        let (number, place) = (self.random(), self.random() as usize);
        let holder = match number % 8 {
            0 => return Word::Data(0),
            1 => return Word::Data(number | HEAP),
            2..=4 => index,
            _ => (number >> 8) as usize % (index + 1),
        };
        let level = if holder == index { own } else { &self.endless.levels[holder] };
        Word::Place(holder, (place % (level.words.len() * 8)) as i32 - level.frame_bytes as i32)
    }
}
