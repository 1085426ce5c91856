//! Attaching a thread: its alternate signal stack, its key domain and its shadow mode.
//!
//! A signal frame is larger than a small stack (`AT_MINSIGSTKSZ` is 10 KB with SVE and SME), so handlers run on an
//! alternate stack, and a segment needs no room for them.

use crate::abi::Activation;
use crate::error::Error;
use crate::features::{self, Domain};
use crate::published;
use crate::segment::{Segment, page_size};
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, compiler_fence};

/// Room that a handler has besides the kernel's signal frame, in bytes.
pub const HANDLER_ROOM: usize = 16 << 10;

/// An attached thread. Not `Send`: it speaks of the thread that made it. Dropping it detaches.
#[derive(Debug)]
pub struct Thread {
    domain: Domain,
    not_send: PhantomData<*const ()>,
}

/// What this thread's attachments share: the last one to go restores what the first one found.
struct Attachments {
    count: usize,
    /// The alternate stack that was installed, where the thread had none that suffices, and what it replaced.
    alternate: Option<(Segment, libc::stack_t)>,
}

thread_local! {
    static CURRENT: Cell<*const Running> = const { Cell::new(std::ptr::null()) };
    static ATTACHMENTS: RefCell<Attachments> = const { RefCell::new(Attachments { count: 0, alternate: None }) };
}

impl Thread {
    /// Attaches the calling thread: verifies its alternate signal stack or installs one of
    /// `AT_MINSIGSTKSZ` + [`HANDLER_ROOM`] bytes with a guard, and records its key domain and shadow mode. A thread can
    /// be attached more than once; it is detached when the last of them is dropped.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is none for the alternate stack. [`Error::Thread`] when this thread has a shadow stack and the first
    /// one of the process that attached had none: how stacks are switched is decided once.
    pub fn attach() -> Result<Thread, Error> {
        published::set_mode(features::mode())?;
        let domain = features::domain();
        if domain.shadow && published::mode() & published::MODE_SHADOW == 0 {
            return Err(Error::Thread(
                "it has a shadow stack and the thread that attached first had none: attach it first",
            ));
        }
        ATTACHMENTS.with_borrow_mut(|attachments| {
            attachments.provide()?;
            attachments.count += 1;
            Ok(Thread { domain, not_send: PhantomData })
        })
    }

    /// The thread's key domain and shadow mode, as they were when it attached.
    pub fn domain(&self) -> Domain {
        self.domain
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // A thread that is ending has no attachments any more: then there is nothing left to restore.
        let _ = ATTACHMENTS.try_with(|attachments| {
            let mut attachments = attachments.borrow_mut();
            attachments.count -= 1;
            if attachments.count == 0 {
                attachments.restore();
            }
        });
    }
}

impl Attachments {
    /// Sees to it that handlers have room.
    fn provide(&mut self) -> Result<(), Error> {
        let needed = features::signal_frame_size() + HANDLER_ROOM;
        let old = alternate_stack(None)?;
        if old.ss_flags & libc::SS_DISABLE == 0 && old.ss_size >= needed {
            return Ok(());
        }
        let size = needed.next_multiple_of(page_size());
        let segment = Segment::map(size, page_size(), 0, 0)?;
        let record = segment.record();
        let new = libc::stack_t {
            ss_sp: std::ptr::with_exposed_provenance_mut(record.base),
            ss_flags: 0,
            ss_size: record.size(),
        };
        alternate_stack(Some(&new))?;
        // An earlier one of ours was taken out of use by somebody since, and is done with.
        self.alternate = Some((segment, old));
        Ok(())
    }

    fn restore(&mut self) {
        if let Some((segment, old)) = self.alternate.take() {
            let ours = alternate_stack(None).is_ok_and(|now| now.ss_sp.addr() == segment.record().base);
            // Somebody else's is left alone. Ours stays mapped if it cannot be taken out of use.
            if ours && alternate_stack(Some(&old)).is_err() {
                std::mem::forget(segment);
            }
        }
    }
}

fn alternate_stack(new: Option<&libc::stack_t>) -> Result<libc::stack_t, Error> {
    let mut old = std::mem::MaybeUninit::<libc::stack_t>::uninit();
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `new` is null or a live stack_t naming memory that stays mapped while it is installed.
    if unsafe { libc::sigaltstack(new, old.as_mut_ptr()) } != 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
        return Err(Error::Memory { what: "an alternate signal stack", bytes: HANDLER_ROOM, errno });
    }
    // SAFETY: the call succeeded and filled it.
    Ok(unsafe { old.assume_init() })
}

/// Has the callee-saved registers (arm64: x19-x28, d8-d15) of suspended stacks sealed with their contexts, in the whole process. Each
/// switch then computes 18 codes more, both ways. Without generic authentication it has no effect. To be called before the first thread attaches
/// and before the first stack is leased: what a context is sealed with is decided once, in memory that nobody can write.
///
/// # Errors
/// [`Error::Busy`] when stacks were made already, [`Error::Memory`] when the read-only page cannot be replaced.
pub fn seal_callee_saved() -> Result<(), Error> {
    if published::directory().1 != 0 && published::mode() & published::MODE_FULL_SEAL == 0 {
        return Err(Error::Busy);
    }
    published::add_mode(published::MODE_FULL_SEAL)
}

/// The activation whose managed code this thread runs, or whose native callee. Async-signal-safe.
///
/// After a longjmp out of a native callee it is still that of the stack which was jumped out of, until an entry around that one ends or the stack is
/// dropped: the activation must live as long.
pub fn current_activation() -> Option<NonNull<Activation>> {
    youngest(|running| match running.kind.get() {
        Kind::Managed(activation) => Some(activation),
        Kind::Poll(_) => None,
    })
}

/// What the youngest poll of a stack on this thread lends, `None` when there is none or the youngest lends nothing.
pub(crate) fn current_poll() -> Option<NonNull<()>> {
    youngest(|running| match running.kind.get() {
        Kind::Managed(_) => None,
        Kind::Poll(lent) => Some(lent),
    })
    .flatten()
}

/// What the youngest record is, of those that are something. Async-signal-safe.
fn youngest<T>(of: impl Fn(&Running) -> Option<T>) -> Option<T> {
    let mut next = CURRENT.get();
    // SAFETY: a record in the list lives until it has left the list.
    while let Some(running) = unsafe { next.as_ref() } {
        if let Some(found) = of(running) {
            return Some(found);
        }
        next = running.outer.get();
    }
    None
}

/// That a native frame has entered managed code with an activation, or polls a future that has a stack. A thread links its own records, the youngest
/// first. That of an entry belongs to its stack, not to the frame: a longjmp can leave the frame, and what lay there is overwritten.
#[derive(Debug)]
pub(crate) struct Running {
    kind: Cell<Kind>,
    /// An address on the stack that the frame lies on.
    place: Cell<usize>,
    outer: Cell<*const Running>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Managed(NonNull<Activation>),
    Poll(Option<NonNull<()>>),
}

impl Running {
    /// Of a stack that nothing runs on.
    pub(crate) fn idle() -> Self {
        Running::polling(None)
    }

    /// Of a poll that lends what `lent` points to, or of one that must not be suspended.
    pub(crate) fn polling(lent: Option<NonNull<()>>) -> Self {
        Running { kind: Cell::new(Kind::Poll(lent)), place: Cell::new(0), outer: Cell::new(std::ptr::null()) }
    }

    /// Puts the record into the thread's list until the guard is dropped; they nest. The frame that calls this lies on the stack that runs.
    pub(crate) fn begin(&self) -> Ended<'_> {
        self.place.set((&raw const self.place).addr());
        self.link()
    }

    /// The same of an entry with this activation, whose frame lies where `frame` does.
    pub(crate) fn enter(&self, activation: &Activation, frame: &u8) -> Ended<'_> {
        self.kind.set(Kind::Managed(NonNull::from(activation)));
        self.place.set(std::ptr::from_ref(frame).addr());
        self.link()
    }

    fn link(&self) -> Ended<'_> {
        self.outer.set(CURRENT.get());
        // A handler that sees the record must see what is in it.
        compiler_fence(Ordering::Release);
        CURRENT.set(self);
        Ended(self)
    }

    /// Takes the record of an entry that a longjmp has left out of this thread's list, and says whether it was there.
    pub(crate) fn forget(&self) -> bool {
        let mut younger: *const Running = std::ptr::null();
        let mut next = CURRENT.get();
        // SAFETY: as in `youngest`.
        while let Some(running) = unsafe { next.as_ref() } {
            if std::ptr::eq(running, self) {
                // SAFETY: as above.
                match unsafe { younger.as_ref() } {
                    Some(younger) => younger.outer.set(self.outer.get()),
                    None => CURRENT.set(self.outer.get()),
                }
                return true;
            }
            (younger, next) = (next, running.outer.get());
        }
        false
    }
}

/// Takes a record out of its thread's list, and with it those of frames within its own that a longjmp has left.
pub(crate) struct Ended<'a>(&'a Running);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        CURRENT.set(self.0.outer.get());
    }
}

/// Whether any frame of this thread has a record.
#[inline(always)]
pub(crate) fn has_records() -> bool {
    !CURRENT.get().is_null()
}

/// The records of stacks that are suspended together, out of the list for as long.
pub(crate) struct Detached {
    first: *const Running,
    last: *const Running,
}

impl Detached {
    /// Takes out the records that lie where `on_stack` says: on the stacks that run, so the youngest.
    pub(crate) fn of_stacks(on_stack: impl Fn(usize) -> bool) -> Option<Detached> {
        let first = CURRENT.get();
        let mut last = std::ptr::null();
        let mut next = first;
        // SAFETY: as in `youngest`.
        while let Some(running) = unsafe { next.as_ref() }.filter(|running| on_stack(running.place.get())) {
            last = next;
            next = running.outer.get();
        }
        if last.is_null() {
            return None;
        }
        CURRENT.set(next);
        Some(Detached { first, last })
    }

    /// Puts them back on top of what this thread, which may be another one, has now.
    pub(crate) fn attach(self) {
        // SAFETY: the records lie on the stack that runs again; their frames have not gone on since they were taken out.
        unsafe { (*self.last).outer.set(CURRENT.get()) };
        compiler_fence(Ordering::Release);
        CURRENT.set(self.first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attach_gives_handlers_room_and_detach_restores() {
        let before = alternate_stack(None).unwrap();
        let thread = Thread::attach().unwrap();
        let during = alternate_stack(None).unwrap();
        assert_eq!(during.ss_flags & libc::SS_DISABLE, 0);
        assert!(during.ss_size >= features::signal_frame_size() + HANDLER_ROOM);
        let again = Thread::attach().unwrap();
        assert_eq!(again.domain(), thread.domain());
        assert_eq!(alternate_stack(None).unwrap().ss_sp, during.ss_sp, "a sufficient alternate stack is kept");
        drop(thread);
        assert_eq!(alternate_stack(None).unwrap().ss_sp, during.ss_sp, "kept while anybody is attached");
        drop(again);
        let after = alternate_stack(None).unwrap();
        assert_eq!((after.ss_sp, after.ss_size), (before.ss_sp, before.ss_size));
    }
}
