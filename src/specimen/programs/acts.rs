//! What managed code and native code do in a program.

use super::Op;
use super::asks::Ask;
use super::endless::{Level, REGISTERS, What, Word};
use super::world::World;
use crate::abi::LinkCall;
use crate::arch;
use crate::error::Error;
use crate::segment::{read_word, write_word};
use crate::specimen::HEAP;
use crate::stack::Exit;

impl World<'_> {
    pub(super) fn call(&mut self, op: &Op) -> Result<(), String> {
        let returns = self.prepare(op.site);
        let caller = self.youngest();
        self.begin(op, self.program.function(op), self.endless.low(caller), returns, Word::Place(caller, 0))
    }

    /// Another function takes the place of the youngest, with stack arguments of its own.
    pub(super) fn tail_call(&mut self, op: &Op) -> Result<(), String> {
        let record = self.endless.record(self.youngest());
        let level = self.epilogue()?;
        let end = record + (level.layout.cfa_bytes + level.layout.incoming) as usize;
        self.begin(op, self.program.function(op), end, level.returns, level.fp)
    }

    /// What stands before a return: the registers come back. Both stacks have lost the frame then.
    fn epilogue(&mut self) -> Result<Level, String> {
        let record = self.endless.record(self.youngest());
        let level = self.pop()?;
        for &(register, offset) in &level.saves {
            self.expected[register.index()] = level.words[level.index(offset)];
            // SAFETY: a word of the frame, which nothing has taken the place of yet.
            let word = unsafe { read_word(record.wrapping_add_signed(offset as isize)) };
            self.registers[register.index()] = word;
        }
        Ok(level)
    }

    pub(super) fn give_back(&mut self) -> Result<(), String> {
        let level = self.epilogue()?;
        if level.is_entered() {
            return self.ended(None);
        }
        if level.returns == arch::link_return() {
            return self.unlink();
        }
        Ok(())
    }

    /// The youngest function calls `grow`.
    pub(super) fn grow(&mut self, site: usize, bytes: usize) -> Result<(), String> {
        let returns = self.prepare(site);
        let low = self.endless.low(self.youngest());
        let record = self.push_stub(What::Grow, low, returns)?;
        self.played.leave(record);
        match self.ask(Ask::Grow(bytes))? {
            Some(error) => self.ended(Some(error)),
            None => self.grown(),
        }
    }

    /// `grow` returns.
    fn grown(&mut self) -> Result<(), String> {
        self.came_back()?;
        self.pop().map(drop)
    }

    /// Where a stub goes on must be where its record is.
    fn came_back(&mut self) -> Result<(), String> {
        let (waits, record) = (self.played.go_back(), self.endless.record(self.youngest()));
        if waits == record { Ok(()) } else { Err(format!("managed code waits at {waits:#x}, not {record:#x}")) }
    }

    pub(super) fn exit(&mut self, op: &Op) -> Result<(), String> {
        let returns = self.prepare(op.site);
        let (expected, registers) = (Box::new(self.expected), self.registers.clone());
        let low = self.endless.low(self.youngest());
        let record = self.push_stub(What::Exit { expected, registers }, low, returns)?;
        self.played.leave(record);
        Ok(())
    }

    /// Calls through a thunk and `link`.
    pub(super) fn link(&mut self, op: &Op) -> Result<(), String> {
        let returns = self.prepare(op.site);
        let caller = self.youngest();
        let (program, low) = (self.program, self.endless.low(caller));
        // Arguments lie where nothing else is.
        let level = &self.endless.levels[caller];
        let is_data = |word: &Word| matches!(word, Word::Data(_));
        let free = level.words[..level.frame_bytes / 8].iter().take_while(|word| is_data(word)).count() * 8;
        let free = level.saves.iter().map(|&(_, offset)| level.index(offset) * 8).fold(free, usize::min);
        let retakes = level.layout.retakes_sp;
        let bytes = if retakes { 0 } else { op.bytes % (free / 8 + 1) * 8 };
        let results = if bytes == 0 { 0 } else { op.noise as usize % (bytes / 8 + 1) * 8 };
        let function = program.function(op);
        let incoming = program.design.functions[function].layout.incoming as usize;
        let area = bytes.next_multiple_of(16);
        if area > free || incoming != 0 && incoming != area {
            return self.begin(op, function, low, returns, Word::Place(caller, 0));
        }
        let results = if incoming == 0 { results } else { 0 };
        let callee = program.design.returns_to(function, 0);
        let call = LinkCall::new(callee, bytes as u32, results as u32, (op.bytes as u32) >> 4).expect("possible sizes");
        let arguments: Vec<u64> = level.words[..area / 8].iter().map(|&word| self.endless.value(word)).collect();

        let thunk = program.thunk();
        self.begin(&Op { site: 0, ..*op }, thunk, low, returns, Word::Place(caller, 0))?;
        if self.endless.levels.len() != caller + 2 {
            // There was no room for the thunk's own frame.
            return Ok(());
        }
        let returns = self.prepare(0);
        let below = self.endless.low(self.youngest());
        let record = self.push_stub(What::Link { area: vec![], results }, below, returns)?;
        let linked = match self.played.link(record, &call) {
            None => {
                if let Some(error) = self.ask_for_segment(record, &call)? {
                    return self.ended(Some(error));
                }
                self.played.link(record, &call).ok_or("there is no segment behind the present one")?
            }
            Some(warm) => warm,
        };
        self.tried.links += 1;
        let link = self.youngest();
        for (number, &word) in arguments.iter().enumerate() {
            // SAFETY: the highest words of the segment that the library has made room in.
            unsafe { write_word(linked.top - area + number * 8, word) };
        }
        let owned = incoming == area;
        if let What::Link { area, .. } = &mut self.endless.levels[link].what {
            *area = if owned { vec![] } else { arguments };
        }
        let end = if owned { linked.top } else { linked.top - area };
        self.begin(op, function, end, arch::link_return(), Word::Place(link, 0))
    }

    /// `link` asks `grow` for a segment.
    fn ask_for_segment(&mut self, record: usize, call: &LinkCall) -> Result<Option<Error>, String> {
        // Below what `link` keeps; where in `link` that is called from, nobody asks.
        let below = self.push_stub(What::Grow, record - 80, arch::link())?;
        self.played.leave(below);
        let (before, image) = (self.played.stats(), self.image());
        let asked = self.played.ask_for_segment(call);
        self.look();
        match asked {
            Ok(()) => {
                self.grown()?;
                Ok(None)
            }
            Err(refusal) => self.refused(refusal, &before, &image, None).map(Some),
        }
    }

    /// `link`'s callee has returned: results come back, and the thunk returns.
    fn unlink(&mut self) -> Result<(), String> {
        let link = self.youngest();
        let record = self.endless.record(link);
        let left = self.played.unlink(record).ok_or("no segment was entered from this link")?;
        let What::Link { area, results } = self.pop()?.what else { return Err("that was no link".into()) };
        self.epilogue()?;
        let caller = self.youngest();
        for number in 0..results / 8 {
            let word = self.random() | HEAP;
            // SAFETY: what the callee leaves in its argument area, which still is the stack's.
            unsafe { write_word(left.top - area.len() * 8 + number * 8, word) };
            self.endless.levels[caller].words[number] = Word::Data(word);
            let offset = self.endless.levels[caller].offset(number);
            self.write(caller, offset);
        }
        Ok(())
    }

    pub(super) fn enter(&mut self, op: &Op) -> Result<(), String> {
        let (end, fp) = match self.endless.levels.is_empty() {
            true => {
                let fp = self.played.enter().map_err(|error| error.to_string())?;
                self.look();
                (self.segments[0].top, fp)
            }
            false => {
                // The same comes first in a nested entry; here tampering would be seen.
                if self.ask(Ask::Reserve(0))?.is_some() {
                    return Ok(());
                }
                let fp = self.played.enter_again().map_err(|error| error.to_string())?;
                self.look();
                self.tried.nested += 1;
                (self.endless.record(self.youngest()), fp)
            }
        };
        self.forget_registers();
        self.begin(op, self.program.function(op), end, arch::entry_return(), Word::Data(fp))
    }

    /// Native code has others in them.
    fn forget_registers(&mut self) {
        self.expected = [Word::Data(HEAP); REGISTERS];
        *self.registers = [HEAP; REGISTERS];
    }

    /// The native callee returns.
    pub(super) fn go_back(&mut self) -> Result<(), String> {
        self.came_back()?;
        let What::Exit { expected, registers } = self.pop()?.what else { return Err("that was no exit".into()) };
        (self.expected, *self.registers) = (*expected, *registers);
        Ok(())
    }

    /// The innermost entry is over: its oldest frame has returned, or growth was refused and its frames are gone.
    fn ended(&mut self, failure: Option<Error>) -> Result<(), String> {
        if failure.is_some() {
            while !self.pop()?.is_entered() {}
        }
        let value = self.random();
        let got = self.played.end(value, failure.clone());
        let expected = failure.map_or(Ok(Exit::Returned(value)), Err);
        self.look();
        self.forget_registers();
        if let Some(What::Exit { expected, registers }) = self.endless.levels.last().map(|level| &level.what) {
            // The native callee goes on with what it had; nobody looks until it returns.
            (self.expected, *self.registers) = (**expected, **registers);
        }
        if got == expected { Ok(()) } else { Err(format!("an entry gave {got:?} instead of {expected:?}")) }
    }
}
