//! What a specimen is made of, decided by numbers.

use super::CODE;
use crate::codemap::{FrameLayout, Register, Registration, Safepoint, Table};
use crate::error::Error;
use crate::pac::{Binding, PointerSigning, RawPc, Signing};

/// What a specimen is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Design {
    /// The keys A and B of the CPU, or none on a CPU that authenticates nothing.
    pub keys: Option<[u64; 2]>,
    /// How the stubs sign that own the youngest record of each piece.
    pub stub: Signing,
    /// Whether a shadow stack is on.
    pub shadow: bool,
    /// The functions of the code map, by ascending address.
    pub functions: Vec<Function>,
    /// The managed frames, youngest first. A stub's record comes before them, and behind each that was entered.
    pub calls: Vec<Call>,
    /// Bytes of stack arguments that each piece was entered with, a multiple of 16.
    pub arguments: usize,
    /// Whether stubs keep the callee-saved registers.
    pub keeps: bool,
    /// Bytes of the source below the youngest record, a multiple of 16.
    pub slack: usize,
    /// Bytes of the destination below the moved youngest record, a multiple of 16.
    pub room: usize,
    /// Decides the words that are not pointers, records or return addresses.
    pub contents: u64,
}

/// A function of the code map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Layout of its frames.
    pub layout: FrameLayout,
    /// Which callee-saved registers it saves, and where: offsets from fp. It puts pointers in those alone.
    pub saves: Vec<(Register, i32)>,
    /// Bytes between the function before it and this one, a multiple of 4.
    pub gap: usize,
    /// Bytes of code, a positive multiple of 4.
    pub len: usize,
    /// Its calls, by ascending address.
    pub sites: Vec<Site>,
}

/// A call in a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Where it returns to, from the function's start: 1 up to its length.
    pub offset: usize,
    /// fp − sp there, when it is not the function's.
    pub frame_bytes: Option<u32>,
    /// Offsets from fp of the slots that hold pointers into the stack.
    pub slots: Vec<i32>,
    /// The registers that do.
    pub registers: Vec<Register>,
}

/// A managed frame: the call that it is suspended in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Index of the function.
    pub function: usize,
    /// Index of its site.
    pub site: usize,
    /// Bytes that a frame of dynamic size has more than it must, a multiple of 16.
    pub more: usize,
    /// Whether native code entered it, which an older managed frame had called. The oldest frame was entered anyway.
    pub entered: bool,
    /// What the site's slots hold, in their order, then its registers; those beyond this list hold null.
    pub pointers: Vec<Pointer>,
}

/// What a slot for pointers into the stack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pointer {
    /// 0.
    Null,
    /// A place that is no stack's, made of this number.
    Heap(u64),
    /// This many bytes into its own frame, counted from its lowest address around its size.
    Own(usize),
    /// This many bytes into the span, counted from its lowest address around its size.
    Span(usize),
    /// The segment's lowest address.
    Base,
    /// One past its highest: still a pointer into the stack.
    Top,
    /// A word above that: a pointer into the stack no more.
    AboveTop,
    /// A word below the segment.
    BelowBase,
}

/// Largest number of managed frames that [`Design::choose`] makes.
pub const MOST_CALLS: u64 = 200;

impl Design {
    /// A design made of decisions: `pick(n)` gives a number below `n`, which is never 0.
    pub fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Design {
        let keys = match pick(4) {
            0 => None,
            _ => Some([pick(u64::MAX), pick(u64::MAX)]),
        };
        let signs = |pick: &mut dyn FnMut(u64) -> u64| match (keys, pick(2)) {
            (None, _) => Signing::None,
            (_, 0) => Signing::A,
            _ => Signing::B,
        };
        let stub = signs(pick);
        let shadow = pick(2) == 1;
        // Half of all designs have plain frames alone.
        let kinds = pick(2) == 1;
        let functions: Vec<Function> = (0..=pick(6))
            .map(|_| {
                let signing = signs(pick);
                Function::choose(pick, signing, kinds)
            })
            .collect();
        let depth = match pick(8) {
            0 => pick(MOST_CALLS + 1),
            _ => pick(16),
        };
        let calls = (0..depth)
            .map(|_| {
                let function = pick(functions.len() as u64) as usize;
                let site = pick(functions[function].sites.len() as u64) as usize;
                let held = &functions[function].sites[site];
                let pointers = (0..held.slots.len() + held.registers.len()).map(|_| Pointer::choose(pick)).collect();
                let more = if functions[function].layout.dynamic { pick(20) as usize * 16 } else { 0 };
                Call { function, site, more, entered: kinds && pick(12) == 0, pointers }
            })
            .collect();
        let arguments = if kinds { pick(4) as usize * 16 } else { 0 };
        let slack = pick(32) as usize * 16;
        let room = pick(64) as usize * 16;
        let contents = pick(u64::MAX);
        Design { keys, stub, shadow, functions, calls, arguments, keeps: true, slack, room, contents }
    }

    /// The code map that describes the design's frames.
    ///
    /// # Errors
    /// [`Error::Layout`] for functions that cannot be, [`Error::Memory`].
    pub fn table(&self) -> Result<Table, Error> {
        self.registration(|_| true)?.table()
    }

    /// What registers the functions that are `known`, by their index.
    pub(super) fn registration(&self, known: impl Fn(usize) -> bool) -> Result<Registration, Error> {
        let mut map = Registration::new();
        let all = self.functions.iter().zip(self.starts()).enumerate();
        for (_, (function, start)) in all.filter(|&(index, _)| known(index)) {
            map.function(RawPc::new(start), function.len, function.layout)?;
            map.saves(RawPc::new(start), &function.saves)?;
            for site in &function.sites {
                let Site { frame_bytes, slots, registers, .. } = site;
                map.call(RawPc::new(start + site.offset), Safepoint { frame_bytes: *frame_bytes, slots, registers })?;
            }
        }
        Ok(map)
    }

    /// The address behind a call.
    pub fn pc(&self, call: &Call) -> RawPc {
        self.returns_to(call.function, call.site)
    }

    /// The address behind the call at a function's site.
    pub(super) fn returns_to(&self, function: usize, site: usize) -> RawPc {
        let start = self.starts().nth(function).unwrap_or(CODE);
        RawPc::new(start + self.functions[function].sites[site].offset)
    }

    fn starts(&self) -> impl Iterator<Item = usize> {
        let mut end = CODE;
        self.functions.iter().map(move |function| {
            let start = end + function.gap;
            end = start + function.len;
            start
        })
    }

    /// fp − sp in a frame.
    pub(super) fn frame_bytes(&self, call: &Call) -> usize {
        let function = &self.functions[call.function];
        function.sites[call.site].frame_bytes.unwrap_or(function.layout.frame_bytes) as usize + call.more
    }

    /// Bytes from the youngest record to the top.
    pub fn span(&self) -> usize {
        self.place(0).1
    }

    /// Whether a frame, by its index, is the oldest of its piece.
    pub(super) fn ends_piece(&self, index: usize) -> bool {
        index + 1 == self.calls.len() || self.calls[index].entered
    }

    /// Where each managed frame's record stands when the youngest stub's stands at `low`, and where the span ends. The stub's
    /// record of an older piece stands where the piece before it ends.
    pub(super) fn place(&self, low: usize) -> (Vec<usize>, usize) {
        let mut begin = low + 16;
        if self.calls.is_empty() {
            return (vec![], begin + self.arguments);
        }
        let mut records = Vec::with_capacity(self.calls.len());
        let mut end = begin;
        for (index, call) in self.calls.iter().enumerate() {
            let layout = &self.functions[call.function].layout;
            let record = begin + self.frame_bytes(call);
            records.push(record);
            end = record + (layout.cfa_bytes + layout.incoming) as usize;
            begin = end;
            if self.ends_piece(index) {
                // A function that owns stack arguments was entered with just those.
                end += if layout.incoming == 0 { self.arguments } else { 0 };
                begin = end + 16;
            }
        }
        (records, end)
    }
}

impl Function {
    fn choose(pick: &mut dyn FnMut(u64) -> u64, signing: Signing, kinds: bool) -> Function {
        let frame_bytes = 16
            * match pick(24) {
                0 => pick(256) as u32,
                1..4 => 0,
                _ => pick(10) as u32,
            };
        let mut layout = FrameLayout::new(frame_bytes, signing);
        let mut saves = vec![];
        if kinds && pick(4) != 0 {
            layout = Function::choose_kind(pick, layout);
            saves = Function::choose_saves(pick, &layout);
        }
        let words = pick(63) as usize + 1;
        let first = pick(words as u64) as usize + 1;
        let sites = (first..=words)
            .step_by(pick(words as u64) as usize + 1)
            .take(5)
            .map(|word| Site::choose(pick, word * 4, &layout, &saves, kinds))
            .collect();
        Function { layout, saves, gap: pick(4) as usize * 4, len: words * 4, sites }
    }

    fn choose_kind(pick: &mut dyn FnMut(u64) -> u64, plain: FrameLayout) -> FrameLayout {
        let cfa_bytes = 16 + 8 * pick(2) as u32 * pick(8) as u32;
        let mut layout = plain.with_cfa_bytes(cfa_bytes).with_incoming(16 * pick(2) as u32 * pick(5) as u32);
        layout.frame_bytes += cfa_bytes % 16;
        layout.frame_pointer = [PointerSigning::None, PointerSigning::A, PointerSigning::B][pick(3) as usize];
        layout.binding = match pick(4) {
            0 => Binding::Zero,
            1 => Binding::Blended(pick(1 << 16) as u16),
            _ => Binding::Cfa,
        };
        layout.dynamic = layout.binding != Binding::Zero && pick(3) == 0;
        layout.conservative = pick(3) == 0;
        layout
    }

    fn choose_saves(pick: &mut dyn FnMut(u64) -> u64, layout: &FrameLayout) -> Vec<(Register, i32)> {
        let mut offsets = slots(pick, layout, layout.frame_bytes, 4);
        let registers = (0..Register::NAMES.len()).filter_map(Register::new);
        registers.filter(|_| pick(2) == 0).zip(std::iter::from_fn(|| offsets.pop())).collect()
    }
}

/// Up to `most` slots of a frame.
fn slots(pick: &mut dyn FnMut(u64) -> u64, layout: &FrameLayout, frame_bytes: u32, most: u64) -> Vec<i32> {
    let above = (layout.cfa_bytes + layout.incoming) / 8;
    let words = u64::from(frame_bytes / 8 + above);
    let mut slots: Vec<i32> = (0..pick(most)).map(|_| 8 * pick(words) as i32 - frame_bytes as i32).collect();
    slots.sort_unstable();
    slots.dedup();
    slots.retain(|&slot| slot != 0 && slot as usize != layout.return_offset());
    slots
}

impl Site {
    fn choose(
        pick: &mut dyn FnMut(u64) -> u64,
        offset: usize,
        layout: &FrameLayout,
        saves: &[(Register, i32)],
        kinds: bool,
    ) -> Site {
        let frame_bytes = (kinds && pick(4) == 0).then(|| layout.frame_bytes + 16 * pick(4) as u32);
        let mut slots = slots(pick, layout, frame_bytes.unwrap_or(layout.frame_bytes), 4);
        slots.retain(|slot| saves.iter().all(|(_, taken)| taken != slot));
        let registers = saves.iter().map(|&(register, _)| register).filter(|_| pick(2) == 0).collect();
        Site { offset, frame_bytes, slots, registers }
    }
}

impl Pointer {
    fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Pointer {
        match pick(10) {
            0 => Pointer::Null,
            1 => Pointer::Heap(pick(u64::MAX)),
            2 => Pointer::Base,
            3 => Pointer::Top,
            4 => Pointer::AboveTop,
            5 => Pointer::BelowBase,
            6 | 7 => Pointer::Own(pick(4096) as usize),
            _ => Pointer::Span(pick(1 << 20) as usize),
        }
    }
}
