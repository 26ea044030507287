// Owns RocksDB's own fault-injecting file system, made reachable from Rust tests: a power cut at any
// write, sync or rename, after which everything is gone that was not synced. `./x setup` compiles it
// beside the RocksDB library; nothing but tests ever links it.

#include <atomic>
#include <memory>
#include <string>

#include "rocksdb/c.h"
#include "rocksdb/env.h"
#include "rocksdb/file_system.h"
#include "rocksdb/system_clock.h"
#include "env/composite_env_wrapper.h"
#include "util/random.h"
#include "utilities/fault_injection_fs.h"

using namespace rocksdb;

// As RocksDB's C interface has it (db/c.cc, of the version that Cargo.lock pins).
struct rocksdb_env_t {
  Env* rep;
  bool is_default;
};

namespace {

// Counts what changes something, and at a given number cuts the power: from then on everything fails.
class Countdown : public FileSystemWrapper {
 public:
  explicit Countdown(const std::shared_ptr<FileSystem>& target) : FileSystemWrapper(target) {}

  const char* Name() const override { return "Countdown"; }

  IOStatus Step() {
    uint64_t at = done.fetch_add(1) + 1;
    if (at >= cut_at.load()) {
      return IOStatus::IOError("the power is cut");
    }
    return IOStatus::OK();
  }

  IOStatus NewWritableFile(const std::string& name, const FileOptions& options,
                           std::unique_ptr<FSWritableFile>* file, IODebugContext* dbg) override;

  IOStatus NewDirectory(const std::string& name, const IOOptions& options,
                        std::unique_ptr<FSDirectory>* dir, IODebugContext* dbg) override;

  IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions& options,
                      IODebugContext* dbg) override {
    IOStatus step = Step();
    return step.ok() ? target()->RenameFile(from, to, options, dbg) : step;
  }

  IOStatus DeleteFile(const std::string& name, const IOOptions& options,
                      IODebugContext* dbg) override {
    IOStatus step = Step();
    return step.ok() ? target()->DeleteFile(name, options, dbg) : step;
  }

  std::atomic<uint64_t> done{0};
  std::atomic<uint64_t> cut_at{UINT64_MAX};
};

class CountedFile : public FSWritableFileOwnerWrapper {
 public:
  CountedFile(std::unique_ptr<FSWritableFile>&& file, Countdown* countdown)
      : FSWritableFileOwnerWrapper(std::move(file)), countdown_(countdown) {}

  IOStatus Append(const Slice& data, const IOOptions& options, IODebugContext* dbg) override {
    IOStatus step = countdown_->Step();
    return step.ok() ? target()->Append(data, options, dbg) : step;
  }

  IOStatus Append(const Slice& data, const IOOptions& options,
                  const DataVerificationInfo& info, IODebugContext* dbg) override {
    IOStatus step = countdown_->Step();
    return step.ok() ? target()->Append(data, options, info, dbg) : step;
  }

  IOStatus Sync(const IOOptions& options, IODebugContext* dbg) override {
    IOStatus step = countdown_->Step();
    return step.ok() ? target()->Sync(options, dbg) : step;
  }

  IOStatus Fsync(const IOOptions& options, IODebugContext* dbg) override {
    IOStatus step = countdown_->Step();
    return step.ok() ? target()->Fsync(options, dbg) : step;
  }

 private:
  Countdown* countdown_;
};

class CountedDirectory : public FSDirectoryWrapper {
 public:
  CountedDirectory(std::unique_ptr<FSDirectory>&& dir, Countdown* countdown)
      : FSDirectoryWrapper(std::move(dir)), countdown_(countdown) {}

  IOStatus Fsync(const IOOptions& options, IODebugContext* dbg) override {
    IOStatus step = countdown_->Step();
    return step.ok() ? FSDirectoryWrapper::Fsync(options, dbg) : step;
  }

  IOStatus FsyncWithDirOptions(const IOOptions& options, IODebugContext* dbg,
                               const DirFsyncOptions& dir_options) override {
    IOStatus step = countdown_->Step();
    return step.ok() ? FSDirectoryWrapper::FsyncWithDirOptions(options, dbg, dir_options) : step;
  }

 private:
  Countdown* countdown_;
};

// RocksDB sleeps for a second after a failed flush.
class ImpatientClock : public SystemClockWrapper {
 public:
  ImpatientClock() : SystemClockWrapper(SystemClock::Default()) {}

  const char* Name() const override { return "ImpatientClock"; }

  void SleepForMicroseconds(int) override { target_->SleepForMicroseconds(100); }
};

IOStatus Countdown::NewWritableFile(const std::string& name, const FileOptions& options,
                                    std::unique_ptr<FSWritableFile>* file, IODebugContext* dbg) {
  IOStatus step = Step();
  if (!step.ok()) return step;
  IOStatus made = target()->NewWritableFile(name, options, file, dbg);
  if (made.ok()) file->reset(new CountedFile(std::move(*file), this));
  return made;
}

IOStatus Countdown::NewDirectory(const std::string& name, const IOOptions& options,
                                 std::unique_ptr<FSDirectory>* dir, IODebugContext* dbg) {
  IOStatus made = target()->NewDirectory(name, options, dir, dbg);
  if (made.ok()) dir->reset(new CountedDirectory(std::move(*dir), this));
  return made;
}

}  // namespace

struct coracle_power {
  std::shared_ptr<Countdown> countdown;
  std::shared_ptr<FaultInjectionTestFS> faults;
};

extern "C" {

coracle_power* coracle_power_new() {
  auto* power = new coracle_power;
  power->countdown = std::make_shared<Countdown>(FileSystem::Default());
  power->faults = std::make_shared<FaultInjectionTestFS>(power->countdown);
  // Keeps what is not synced in memory; else it would stand in the files and survive.
  power->faults->SetInjectUnsyncedDataLoss(true);
  return power;
}

void coracle_power_free(coracle_power* power) { delete power; }

// An environment on these files, owned by the caller; it must be gone before the power is freed.
rocksdb_env_t* coracle_power_env(coracle_power* power) {
  auto clock = std::make_shared<ImpatientClock>();
  return new rocksdb_env_t{new CompositeEnvWrapper(Env::Default(), power->faults, clock), false};
}

// Operations so far.
uint64_t coracle_power_done(coracle_power* power) { return power->countdown->done.load(); }

// The operation with this number, and all after it, fail.
void coracle_power_cut_at(coracle_power* power, uint64_t operation) {
  power->countdown->cut_at.store(operation);
}

// After every store on it was closed: what was not synced is lost, whole (seed 0) or a random tail of
// each file. The power is back. False when that itself went wrong.
bool coracle_power_lose(coracle_power* power, uint32_t seed) {
  power->faults->SetFilesystemActive(false);
  power->countdown->cut_at.store(UINT64_MAX);
  IOStatus lost;
  if (seed == 0) {
    lost = power->faults->DropUnsyncedFileData();
  } else {
    Random random(seed);
    lost = power->faults->DropRandomUnsyncedFileData(&random);
  }
  power->faults->SetFilesystemActive(true);
  IOStatus deleted = power->faults->DeleteFilesCreatedAfterLastDirSync(IOOptions(), nullptr);
  power->faults->ResetState();
  return lost.ok() && deleted.ok();
}
}
